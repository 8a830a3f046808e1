// One table of kernels per instruction set. isa_table.cpp fills it (compiled once per set), dispatch.cpp chooses one.
#pragma once
#include "abi.h"

struct KernelTable {
  const char* isa;
#define KERNEL(NAME, ARGS) int (*NAME)(const ARGS*);
#include "kernels.def"
#undef KERNEL
};
