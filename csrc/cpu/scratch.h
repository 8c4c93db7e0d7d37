// Working memory of one call, from the recycling pool (memory.cpp): blocks a thread needs again and
// again must not be touched for the first time again and again.
#pragma once

#include "memory.h"

namespace fastlm::cpu::FASTLM_ISA {

template <class A> class Scratch {
 public:
  explicit Scratch(int64_t count) : bytes_(size_t(count) * sizeof(A)), data_(take_block(bytes_)) {}
  ~Scratch() { give_block(data_, bytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* data() const { return static_cast<A*>(data_); }

 private:
  size_t bytes_;
  void* data_;
};

}  // namespace fastlm::cpu::FASTLM_ISA
