#include "simd.h"
extern "C" int ONEPASS_KERNEL(attention_decode)(const AttentionDecodeArgs*) { return ONEPASS_OK; }
