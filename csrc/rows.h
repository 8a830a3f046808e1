// What the row-wise kernels share: ends of rows, long rows cut into segments, threads, and how large outputs are written.
#pragma once
#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "workspace.h"

// ---- vectors of a row: whole ones, and the last lanes of a row whose length is no multiple

struct Whole {};
struct Part { int64_t count; };  // 0 < count < VW

template <class T>
ONEPASS_INLINE vf load(const T* p, Whole, float = 0.f) { return load(p); }
template <class T>
ONEPASS_INLINE void store(T* p, vf v, Whole) { store(p, v); }

// The lanes past `count` become `fill`.
template <class T>
ONEPASS_INLINE vf load(const T* p, Part lane, float fill = 0.f) {
  T copy[VW];
  for (int64_t i = 0; i < VW; i++) i < lane.count ? (void)(copy[i] = p[i]) : from_float(fill, copy + i);
  return load(copy);
}
template <class T>
ONEPASS_INLINE void store(T* p, vf v, Part lane) {
  T copy[VW];
  store(copy, v);
  for (int64_t i = 0; i < lane.count; i++) p[i] = copy[i];
}
ONEPASS_INLINE vf only(vf v, Whole) { return v; }
// v with zeros in the lanes past `count`.
ONEPASS_INLINE vf only(vf v, Part lane) { return lanes() < broadcast_int((int32_t)lane.count) ? v : (vf){}; }

// f(i, u, lane) for every vector [i, i + VW) of begin..end; u counts 0..U-1, for sums kept apart so that they do not wait for each other.
template <int U, class F>
ONEPASS_INLINE void for_vectors(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + U * VW <= end; i += U * VW)
#pragma GCC unroll 8
    for (int u = 0; u < U; u++) f(i + u * VW, u, Whole{});
  if constexpr (U > 1)
    for (; i + VW <= end; i += VW) f(i, 0, Whole{});
  if (i < end) f(i, 0, Part{end - i});
}

// Fetches, from the u-th vector of an unrolled loop, the line at p into the second-level cache: what the next row will read. A pass that
// works in the caches leaves memory idle otherwise, and the processor's own prefetching stops at every page.
template <class T>
ONEPASS_INLINE void fetch(const T* p, int u) {
  if (u * VW * (int)sizeof(T) % 64 == 0) __builtin_prefetch(p, 0, 2);
}

constexpr int SUMS = 4;  // kept apart

ONEPASS_INLINE float total(const vf (&s)[SUMS]) { return horizontal_sum((s[0] + s[1]) + (s[2] + s[3])); }

// v as it reads when it has been stored as T.
ONEPASS_INLINE vf rounded(const float*, vf v) { return v; }
template <class T>
ONEPASS_INLINE vf rounded(const T*, vf v) {
  T copy[VW];
  store(copy, v);
  return load(copy);
}

// ---- outputs

constexpr int64_t HUGE_OUTPUT = 4 << 20;    // bytes from which huge pages are asked for
constexpr int64_t STREAMED_OUTPUT = 16 << 20;  // bytes that would only push everything else out of the caches

// Fresh memory of this size is page faults above all: with huge pages there are 512 times fewer. Called before it is touched.
ONEPASS_INLINE void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < HUGE_OUTPUT) return;
  const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
  const uintptr_t begin = ((uintptr_t)data + page - 1) / page * page, end = ((uintptr_t)data + (uintptr_t)bytes) / page * page;
  madvise((void*)begin, end - begin, MADV_HUGEPAGE);  // advice: failing changes nothing
#else
  (void)data, (void)bytes;
#endif
}

// A vector past the caches to memory, where the processor can; p is aligned to the vector's size as stored.
template <class T>
ONEPASS_INLINE void store_past_caches(T* p, vf v) {
#if defined(__x86_64__)
  alignas(64) T copy[VW];
  store(copy, v);
  constexpr int bytes = VW * (int)sizeof(T);
  if constexpr (bytes == 8) {
    long long word;
    memcpy(&word, copy, 8);
    _mm_stream_si64((long long*)p, word);
  } else if constexpr (bytes == 16) {
    _mm_stream_si128((__m128i*)p, *(const __m128i*)copy);
  }
#if ONEPASS_VW >= 8
  else if constexpr (bytes == 32) {
    _mm256_stream_si256((__m256i*)p, *(const __m256i*)copy);
  }
#endif
#if ONEPASS_VW == 16
  else if constexpr (bytes == 64) {
    _mm512_stream_si512((__m512i*)p, *(const __m512i*)copy);
  }
#endif
#else
  store(p, v);
#endif
}

// Stores past the caches are ordered with nothing: each thread waits for its own before it reports that it is done.
ONEPASS_INLINE void finish_stores() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// A fresh output of contiguous rows (or any pieces that start at multiples of `columns` elements).
template <class T>
struct Output {
  T* data;
  bool past_caches;

  Output(void* memory, int64_t rows, int64_t columns) : data((T*)memory) {
    const int64_t bytes = rows * columns * (int64_t)sizeof(T);
    past_caches = bytes >= STREAMED_OUTPUT && columns % VW == 0 && (uintptr_t)memory % 64 == 0;
    if (memory) ask_for_huge_pages(memory, bytes);
  }
  __attribute__((always_inline)) void put(int64_t i, vf v, Whole) const {
    if (past_caches)
      store_past_caches(data + i, v);
    else
      store(data + i, v);
  }
  __attribute__((always_inline)) void put(int64_t i, vf v, Part lane) const { store(data + i, v, lane); }
};

// ---- rows and segments

// A row is reduced segment by segment, and the segments' results are combined in order. So sums are accurate, a segment's second pass
// finds it in the first-level cache, and a row's result depends neither on the other rows nor on how threads share the work.
constexpr int64_t SEGMENT = 4096;
constexpr int64_t SMALL = 32768;  // elements that one thread does sooner than two

ONEPASS_INLINE int threads_for(int64_t elements, int64_t threads) { return elements <= SMALL ? 1 : (int)threads; }

// f(row, begin, end) for every segment of every row.
template <class F>
ONEPASS_INLINE void for_segments(int64_t rows, int64_t columns, int64_t num_threads, const F& f) {
  const int64_t segments = ceil_div(columns, SEGMENT), pieces = rows * segments;
  in_parallel(threads_for(rows * columns, num_threads), [&] {
#pragma omp for schedule(static) nowait
    for (int64_t piece = 0; piece < pieces; piece++) {
      const int64_t row = segments == 1 ? piece : piece / segments, begin = (piece - row * segments) * SEGMENT;
      f(row, begin, min_of(columns, begin + SEGMENT));
    }
    finish_stores();
  });
}

// What an operation on rows with a reduction may need; it hides what it has of its own.
struct RowOperation {
  static constexpr int64_t scratch = 0;     // floats for each column of a row, kept from reduce to finish
  static constexpr int64_t column_sums = 0;  // floats for each column, kept by a thread (and zero at first) over all its rows
  static constexpr int64_t rows_at_once = 64;  // rows after which flush is called
  void flush(float*) const {}
  void add_sums(const float*, int64_t, int64_t, int64_t, int64_t) const {}
};

// For every row: op.reduce on its segments, op.combine on what they gave, op.finish on its segments. Threads share the rows, or
// the columns of few long rows. At the end op.add_sums on the column sums of all threads, each `size` floats after the one before.
template <class Op>
int for_rows(const Op& op, int64_t rows, int64_t columns, int64_t num_threads) {
  typedef typename Op::Partial Partial;
  typedef typename Op::Totals Totals;
  const int64_t segments = ceil_div(columns, SEGMENT), scratch_size = round_up(op.scratch * columns, 32), sums_size = round_up(op.column_sums * columns, 32);
  const int threads = threads_for(rows * columns, num_threads);
  const bool by_columns = threads > 1 && segments > 1 && (rows < threads || (rows < 4 * threads && rows % threads != 0));
  const int64_t holders = by_columns ? 1 : threads;  // of partial results, scratch and sums
  const int64_t held_rows = by_columns ? rows : 1;
  // Threads that write to one cache line, or to the pair of lines that is fetched together, wait for each other: each holder has its own.
  constexpr int64_t APART = 128;
  const int64_t partials_size = held_rows * segments + APART / (int64_t)sizeof(Partial) + 1;
  Workspace w;
  Partial* all_partials;
  Totals* all_totals;
  float *all_scratch, *all_sums;
  for (int pass = 0; pass < 2; pass++) {
    all_partials = w.take<Partial>(holders * partials_size);
    all_totals = w.take<Totals>(held_rows);
    all_scratch = w.take<float>(holders * held_rows * scratch_size);
    all_sums = w.take<float>(holders * sums_size);
    if (pass == 0 && !w.allocate()) return ONEPASS_OUT_OF_MEMORY;
  }
  const auto segment_end = [&](int64_t s) { return min_of(columns, (s + 1) * SEGMENT); };
  if (by_columns) {
    in_parallel(threads, [&] {
#pragma omp for schedule(static)
      for (int64_t s = 0; s < segments; s++)
        for (int64_t row = 0; row < rows; row++)
          all_partials[row * segments + s] = op.reduce(row, s * SEGMENT, segment_end(s), all_scratch + row * scratch_size);
#pragma omp for schedule(static)
      for (int64_t row = 0; row < rows; row++) all_totals[row] = op.combine(row, all_partials + row * segments, segments);
#pragma omp for schedule(static)
      for (int64_t s = 0; s < segments; s++) {
        for (int64_t n = 0; n < op.column_sums; n++)
          memset(all_sums + n * columns + s * SEGMENT, 0, sizeof(float) * (size_t)(segment_end(s) - s * SEGMENT));
        for (int64_t row = 0; row < rows; row++)
          op.finish(row, s * SEGMENT, segment_end(s), all_totals[row], all_scratch + row * scratch_size, all_sums);
        op.add_sums(all_sums, 1, sums_size, s * SEGMENT, segment_end(s));
      }
      finish_stores();
    });
    return ONEPASS_OK;
  }
  in_parallel(threads, [&] {
    const int64_t thread = threads == 1 ? 0 : omp_get_thread_num(), team = threads == 1 ? 1 : omp_get_num_threads();
    Partial* partials = all_partials + thread * partials_size;
    float *scratch = all_scratch + thread * scratch_size, *sums = all_sums + thread * sums_size;
    if (sums_size) memset(sums, 0, sizeof(float) * (size_t)sums_size);
    int64_t since_flush = 0;
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++) {
      for (int64_t s = 0; s < segments; s++) partials[s] = op.reduce(row, s * SEGMENT, segment_end(s), scratch);
      const Totals totals = op.combine(row, partials, segments);
      for (int64_t s = 0; s < segments; s++) op.finish(row, s * SEGMENT, segment_end(s), totals, scratch, sums);
      if (Op::column_sums && ++since_flush == Op::rows_at_once) {
        op.flush(sums);
        since_flush = 0;
      }
    }
    if (Op::column_sums) {
#pragma omp barrier
#pragma omp for schedule(static) nowait
      for (int64_t s = 0; s < segments; s++) op.add_sums(all_sums, team, sums_size, s * SEGMENT, segment_end(s));
    }
    finish_stores();
  });
  return ONEPASS_OK;
}

#define ONEPASS_BY_DTYPE(DTYPE, CALL)        \
  switch (DTYPE) {                           \
    case ONEPASS_F32: return CALL(float);    \
    case ONEPASS_F16: return CALL(f16);      \
    default: return CALL(bf16);              \
  }
