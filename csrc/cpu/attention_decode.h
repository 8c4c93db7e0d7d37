// When attention is decoding: few queries, so that the block kernel's lanes would stay empty.
#pragma once

#include "attention_block.h"

namespace fastlm::cpu::FASTLM_ISA {

// The block kernel pays for kQueries queries whatever their number; decode pays for each about
// kQueries / 8 of that.
inline bool is_decode(const AttentionShape& s) {
  return s.queries <= 8 && !s.cu_seqlens_q && s.dropout_p == 0;
}

template <class T> void decode(const AttentionForward& p, int64_t threads);

}  // namespace fastlm::cpu::FASTLM_ISA
