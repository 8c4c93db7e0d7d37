// Several races in one kernel, and stores of one value by many threads.
extern "C" __global__ void two_races(float* y) {
  __shared__ float first[64], second[64];
  first[threadIdx.x] = second[threadIdx.x] = 0;
  __syncthreads();
  first[threadIdx.x] = 1;
  second[threadIdx.x] = 2;
  float sum = first[63 - threadIdx.x];   // first: no barrier
  sum += second[63 - threadIdx.x];       // second: no barrier
  y[threadIdx.x] = sum;
}
// In block 1, thread 0 overwrites what all have read, and alone uses it.
extern "C" __global__ void read_in_vain(float* x, float* y) {
  const float v = x[blockIdx.x];
  if (blockIdx.x == 1 && threadIdx.x == 0) x[1] = 2 * v;
  if (blockIdx.x == 0 || threadIdx.x == 0) y[blockIdx.x * blockDim.x + threadIdx.x] = v;
}
extern "C" __global__ void same_value(float* y) { y[0] = 7; }
extern "C" __global__ void no_race(float* y) { y[threadIdx.x] = 7; }
