#include "../attention.h"
#include "launch.cuh"
namespace fastlm::cuda {
void launch(const AttentionForward&, int64_t) { throw std::invalid_argument("not yet"); }
void launch(const AttentionBackward&, int64_t) { throw std::invalid_argument("not yet"); }
void launch(const CacheAppend&, int64_t) { throw std::invalid_argument("not yet"); }
}  // namespace fastlm::cuda
