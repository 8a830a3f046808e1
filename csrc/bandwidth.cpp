// How fast this many threads read memory or copy it. Threads take blocks in turn; the best pass over the memory counts.
#include <time.h>

#include "rows.h"

namespace {

ONEPASS_INLINE double seconds_now() {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

ONEPASS_INLINE vf sum_block(const float* src, int64_t count) {
  vf sums[8] = {};
  int64_t i = 0;
  for (; i + 8 * VW <= count; i += 8 * VW)
#pragma GCC unroll 8
    for (int u = 0; u < 8; u++) sums[u] += load(src + i + u * VW);
  for (; i + VW <= count; i += VW) sums[0] += load(src + i);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

ONEPASS_INLINE void copy_block(float* dst, const float* src, int64_t count, bool past_caches) {
  if (past_caches)
    for (int64_t i = 0; i < count; i += VW) store_past_caches(dst + i, load(src + i));
  else
    for (int64_t i = 0; i < count; i += VW) store(dst + i, load(src + i));
}

}  // namespace

extern "C" int ONEPASS_KERNEL(bandwidth)(const BandwidthArgs* args) {
  const BandwidthArgs& a = *args;
  const int64_t count = a.bytes / 4 / VW * VW, block = max_of(VW, a.block_bytes / 4 / VW * VW), blocks = ceil_div(count, block);
  const bool copy = a.access != ONEPASS_READ;
  // Pages of their own: huge ones, and let go afterwards.
  float* src = static_cast<float*>(aligned_alloc(2 << 20, (size_t)round_up(count * 4, 2 << 20)));
  float* dst = copy ? static_cast<float*>(aligned_alloc(2 << 20, (size_t)round_up(count * 4, 2 << 20))) : nullptr;
  if (!src || (copy && !dst)) {
    free(src), free(dst);
    return ONEPASS_OUT_OF_MEMORY;
  }
  ask_for_huge_pages(src, count * 4);
  if (copy) ask_for_huge_pages(dst, count * 4);
  double best = 1e30;
  bool done = false;
  const double end = seconds_now() + a.seconds;
#pragma omp parallel num_threads((int)a.num_threads)
  {
    vf sum = {};
#pragma omp for schedule(static, 1)
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t begin = b * block, size = min_of(block, count - begin);
      memset(src + begin, 0, sizeof(float) * (size_t)size);
      if (copy) memset(dst + begin, 0, sizeof(float) * (size_t)size);
    }
    while (!done) {
      const double start = seconds_now();  // the first thread's counts; the loop ends when all are done
#pragma omp for schedule(static, 1)
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t begin = b * block, size = min_of(block, count - begin);
        if (copy)
          copy_block(dst + begin, src + begin, size, a.access == ONEPASS_STREAM);
        else
          sum += sum_block(src + begin, size);
        finish_stores();
      }
#pragma omp master
      {
        const double now = seconds_now();
        best = now - start < best ? now - start : best;
        done = now >= end;
      }
#pragma omp barrier
    }
    if (any(sum != (vf){})) {
#pragma omp atomic write
      best = 0.;  // never: it keeps the sums, and so the reads, alive
    }
  }
  *a.gigabytes_per_second = 1e-9 * (double)(count * 4) * (copy ? 2. : 1.) / best;
  free(src), free(dst);
  return ONEPASS_OK;
}
