// Element types that a tensor may have, and how they are named to the user.
#pragma once

#include <cstdint>

namespace fastlm {

enum class DType : int { f32, f64, bf16, f16, u8, i32, i64, other };

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return "float32";
    case DType::f64: return "float64";
    case DType::bf16: return "bfloat16";
    case DType::f16: return "float16";
    case DType::u8: return "uint8";
    case DType::i32: return "int32";
    case DType::i64: return "int64";
    default: return "a dtype that no kernel takes";
  }
}

constexpr bool is_floating(DType dtype) { return dtype <= DType::f16; }

}  // namespace fastlm
