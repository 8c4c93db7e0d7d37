// Which of attention's kernels runs a call. A source of its own, so that the kernels of every
// device are compiled without those of 9.0, and are the same for all devices in the emulator.
#include "attention_hopper.cuh"

namespace fastlm::cuda {

void launch(const AttentionForward& p, int64_t handle) {
  const AttentionShape& s = p.shape;
  const cudaStream_t stream = stream_of(handle);
  if (s.batch == 0 || s.queries == 0 || s.heads == 0) return;
  if (is_decode(s)) return launch_decode(p, stream);
  if constexpr (built_for_hopper())
    if (hopper_takes(s, {p.q, p.o}, {p.k, p.v})) return launch_hopper(p, stream);
  launch_tiles(p, stream);
}

void launch(const AttentionBackward& p, int64_t handle) {
  const AttentionShape& s = p.shape;
  const cudaStream_t stream = stream_of(handle);
  if (s.batch == 0 || s.heads == 0) return;
  if constexpr (built_for_hopper())
    if (s.queries > 0 && hopper_takes(s, {p.dout, p.q, p.o, p.dq}, {p.k, p.v, p.dk, p.dv}))
      return launch_hopper(p, stream);
  launch_tiles(p, stream);
}

}  // namespace fastlm::cuda
