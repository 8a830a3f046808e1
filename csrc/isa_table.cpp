// The table of this instruction set's kernels.
#include "kernel_table.h"
#include "simd.h"

#define KERNEL(NAME, ARGS) extern "C" int ONEPASS_KERNEL(NAME)(const ARGS*);
#include "kernels.def"
#undef KERNEL

extern "C" const KernelTable ONEPASS_KERNEL(table);
extern "C" const KernelTable ONEPASS_KERNEL(table) = {
    ONEPASS_STRING(ONEPASS_ISA),
#define KERNEL(NAME, ARGS) ONEPASS_KERNEL(NAME),
#include "kernels.def"
#undef KERNEL
};
