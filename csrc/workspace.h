// Scratch memory of one thread for one call, cut into 64-byte aligned pieces.
#pragma once
#include <cstdlib>

#include "simd.h"

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
