#include "simd.h"
extern "C" int ONEPASS_KERNEL(merge_attention)(const MergeArgs*) { return ONEPASS_OK; }
