// fastlm._cuda: the shared bindings for CUDA tensors.
#include "launch.cuh"
#define FASTLM_DEVICE cuda
#ifndef FASTLM_DEVICE_TYPE  // the emulator's build takes tensors of the CPU
#define FASTLM_DEVICE_TYPE dlpack::kCuda
#endif

namespace fastlm::cuda {

// Launches go to the device of their tensors, whichever the thread has made current.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device == before_) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace fastlm::cuda

#include "../bindings.h"

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "fastlm's CUDA kernels";
  fastlm::cuda::bind(m);
}
