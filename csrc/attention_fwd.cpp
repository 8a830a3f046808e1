#include "simd.h"
extern "C" int ONEPASS_KERNEL(attention_fwd)(const AttentionFwdArgs*) { return ONEPASS_OK; }
