#include "simd.h"
extern "C" int ONEPASS_KERNEL(attention_bwd)(const AttentionBwdArgs*) { return ONEPASS_OK; }
