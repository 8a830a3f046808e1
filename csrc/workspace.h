// How a kernel's threads run, and the scratch memory of each.
#pragma once
#include <cstdlib>

#include "simd.h"

// Runs `work_share`, which shares its loops with `omp for`, on that many threads. One thread needs no team: small calls save 0.3 us.
template <class F>
ONEPASS_INLINE void in_parallel(int threads, const F& work_share) {
  if (threads == 1) {
    work_share();
  } else {
#pragma omp parallel num_threads(threads)
    work_share();
  }
}

// Scratch memory of one thread for one call, cut into 64-byte aligned pieces.
// Two passes over the same list of take() calls: the first, without memory, adds up the size; the second hands out pieces.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { free(memory_); }

  template <class T>
  T* take(int64_t count) {
    char* piece = memory_ ? memory_ + used_ : nullptr;
    used_ += round_up(count * (int64_t)sizeof(T), 64);
    return reinterpret_cast<T*>(piece);
  }

  // Call after the first pass; false when there is no memory.
  bool allocate() {
    memory_ = static_cast<char*>(aligned_alloc(64, (size_t)max_of(used_, 64)));
    used_ = 0;
    return memory_ != nullptr;
  }

 private:
  char* memory_ = nullptr;
  int64_t used_ = 0;
};
