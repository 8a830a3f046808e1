// The library's C interface: one entry point per kernel, bound when the library is loaded to the best instruction set
// that this processor (and its operating system) has.
#include <cstring>

#include "kernel_table.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__)
extern "C" const KernelTable onepass_table_v2, onepass_table_avx2, onepass_table_avx512, onepass_table_avx512_bf16;
#else
extern "C" const KernelTable onepass_table_generic;
#endif

namespace {

#if defined(__x86_64__)
const KernelTable* const tables[] = {  // worst to best
    &onepass_table_v2, &onepass_table_avx2, &onepass_table_avx512, &onepass_table_avx512_bf16};

bool supported(const KernelTable* table) {
  __builtin_cpu_init();
  if (table == &onepass_table_v2) return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c") ||
      !__builtin_cpu_supports("bmi2"))
    return false;
  if (table == &onepass_table_avx2) return true;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return false;
  return table == &onepass_table_avx512 || __builtin_cpu_supports("avx512bf16");
}
#else
const KernelTable* const tables[] = {&onepass_table_generic};

bool supported(const KernelTable*) { return true; }
#endif

constexpr int num_tables = sizeof(tables) / sizeof(tables[0]);

const KernelTable* find(const char* isa) {
  for (const KernelTable* table : tables)
    if (!std::strcmp(table->isa, isa)) return table;
  return nullptr;
}

// Intel runs the bf16 dot at half the rate of its fp32 multiply-adds (Emerald Rapids: 216 against 390 GFLOP/s in attention),
// so there bf16 is better widened. AMD runs it at twice the rate.
bool worth_using(const KernelTable* table) {
#if defined(__x86_64__)
  if (table == &onepass_table_avx512_bf16) return !__builtin_cpu_is("intel");
#endif
  return table != nullptr;
}

const KernelTable* best() {
  for (int i = num_tables - 1; i >= 0; i--)
    if (supported(tables[i]) && worth_using(tables[i])) return tables[i];
  return nullptr;  // an x86-64 without SSE4.2: Python reports it
}

const KernelTable* active = best();

}  // namespace

// The instruction set in use; empty when this processor has none of those compiled in.
EXPORT const char* onepass_isa() { return active ? active->isa : ""; }

// The i-th instruction set compiled in, worst first; null past the last.
EXPORT const char* onepass_compiled_isa(int i) { return i >= 0 && i < num_tables ? tables[i]->isa : nullptr; }

EXPORT int onepass_isa_supported(const char* isa) {
  const KernelTable* table = find(isa);
  return table && supported(table);
}

// Takes one of the supported instruction sets; returns 0 (and changes nothing) for any other name.
EXPORT int onepass_set_isa(const char* isa) {
  if (!onepass_isa_supported(isa)) return 0;
  active = find(isa);
  return 1;
}

#define KERNEL(NAME, ARGS) \
  EXPORT int onepass_##NAME(const void* args) { return active->NAME(static_cast<const ARGS*>(args)); }
#include "kernels.def"
#undef KERNEL
