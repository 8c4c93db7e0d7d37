// The seam to Python: one launch, its result, and the faults that must not end the process.
#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>

#include "memory.h"
#include "observer.h"
#include "print.h"

namespace emulator {
namespace {

std::mutex results_mutex;  // guards what several workers write: failure and printed text

thread_local sigjmp_buf* landing = nullptr;
thread_local uint64_t fault_address = 0;

// Faults inside a kernel (a wild pointer, a stack overflow) end the launch, not the process.
void on_fault(int signal, siginfo_t* info, void*) {
  if (landing) {
    fault_address = reinterpret_cast<uint64_t>(info->si_addr);
    siglongjmp(*landing, 1);
  }
  std::signal(signal, SIG_DFL);  // not ours: fault again, as if nobody had caught it
}

class FaultHandler {
 public:
  FaultHandler() {
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &segv_);
    sigaction(SIGBUS, &action, &bus_);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &segv_, nullptr);
    sigaction(SIGBUS, &bus_, nullptr);
  }

 private:
  struct sigaction segv_, bus_;
};

// A stack for the handler: the fiber's own may be the one that overflowed.
class SignalStack {
 public:
  SignalStack() : memory_(new char[kBytes]) {
    stack_t stack{memory_.get(), 0, kBytes};
    sigaltstack(&stack, &before_);
  }
  ~SignalStack() { sigaltstack(&before_, nullptr); }

 private:
  static constexpr size_t kBytes = 64 * 1024;
  std::unique_ptr<char[]> memory_;
  stack_t before_;
};

void report_fault(Worker& worker) {
  ThreadState& t = *worker.current;
  const uint64_t below = t.stack - fault_address;
  char text[160];
  if (below - 1 < 4096)
    std::snprintf(text, sizeof text,
                  "stack overflow: recursion or local arrays of more than %llu KiB",
                  static_cast<unsigned long long>(kStackBytes / 1024));
  else
    std::snprintf(text, sizeof text, "access to invalid memory at address 0x%llx",
                  static_cast<unsigned long long>(fault_address));
  record_failure(t, 0, 0, text);
}

void run_worker(Launch& launch, uint64_t seed) {
  const SignalStack stack;
  Worker worker(launch, seed);
  sigjmp_buf here;
  landing = &here;
  if (sigsetjmp(here, 1) == 0)
    worker.run();
  else
    report_fault(worker);
  landing = nullptr;
}

void check_request(const Request& request, const KernelInfo& kernel) {
  const uint64_t threads = uint64_t(request.block[0]) * request.block[1] * request.block[2];
  if (threads == 0 || threads > 1024)
    throw std::string("the block has " + std::to_string(threads) +
                      " threads; 1 to 1024 are possible");
  if (!request.grid[0] || !request.grid[1] || !request.grid[2])
    throw std::string("the grid is empty");
  const uint64_t shared = uint64_t(kernel.static_shared) + request.dynamic_shared;
  if (shared > request.shared_limit)
    throw "the block needs " + std::to_string(shared) + " bytes of shared memory, the limit is " +
        std::to_string(request.shared_limit);
  if (request.range_count >= kRanges)
    throw std::string("more than " + std::to_string(kRanges - 1) + " buffers");
}

// Blocks that an H100 holds at a time: 132 multiprocessors with 32 blocks, 64 warps and the shared
// memory of the largest block each, of which every block takes 1 KiB more than it asks for.
uint64_t most_resident(const Request& request, const KernelInfo& kernel) {
  if (request.resident) return request.resident;
  constexpr uint64_t kMultiprocessors = 132, kBlocks = 32, kWarps = 64, kSystemShared = 1024;
  const uint64_t threads = uint64_t(request.block[0]) * request.block[1] * request.block[2];
  const uint64_t shared = uint64_t(kernel.static_shared) + request.dynamic_shared + kSystemShared;
  const uint64_t by_warps = kWarps / ((threads + 31) / 32);
  const uint64_t by_shared = (request.shared_limit + kSystemShared) / shared;
  return kMultiprocessors * std::min({kBlocks, by_warps, by_shared});
}

std::string too_large(uint64_t blocks, uint64_t most) {
  return "the grid synchronises, so its " + std::to_string(blocks) +
         " blocks must be resident together, and at most " + std::to_string(most) +
         " are; on a GPU such a launch fails with cudaErrorCooperativeLaunchTooLarge";
}

}  // namespace

Launch::Launch(const Request& request, const KernelInfo& kernel, Result& result)
    : request(request),
      kernel(kernel),
      result(result),
      most_resident(emulator::most_resident(request, kernel)) {
  // No ranges: every entry is the whole address space, so that any hint is right.
  for (int i = 0; i < kRanges; ++i) ranges[i] = request.ranges ? Range{} : Range{0, ~0ull};
  for (uint32_t i = 0; i < request.range_count; ++i) ranges[i] = request.ranges[i];
  if (request.ranges)
    ranges[kRanges - 1] = {reinterpret_cast<uint64_t>(grid_workspace), sizeof grid_workspace};
  const uint64_t blocks = uint64_t(request.grid[0]) * request.grid[1] * request.grid[2];
  if (kernel.synchronizes_grid && blocks > most_resident) throw too_large(blocks, most_resident);
  order.resize(blocks);
  for (uint64_t i = 0; i < blocks; ++i)
    order[i] = request.schedule == uint32_t(Schedule::kReverse) ? blocks - 1 - i : i;
  Worker shuffler(*this, request.seed);
  for (uint64_t i = blocks; request.schedule == uint32_t(Schedule::kRandom) && i > 1; --i)
    std::swap(order[i - 1], order[shuffler.random(uint32_t(i))]);
  if (request.detect_races || request.detect_uninitialized || request.count)
    observer = std::make_unique<Observer>(request);
}
Launch::~Launch() = default;

void record_failure(Thread& t, uint32_t site, uint32_t other_site, const std::string& text) {
  Launch& launch = *block_of(t).launch;
  const std::lock_guard<std::mutex> lock(results_mutex);
  Failure& failure = launch.result.failure;
  if (!failure.failed) {
    std::snprintf(failure.message, sizeof failure.message, "%s", text.c_str());
    failure.failed = 1, failure.site = site, failure.other_site = other_site;
    std::memcpy(failure.ctaid, t.block->ctaid, sizeof failure.ctaid);
    std::memcpy(failure.tid, t.tid, sizeof failure.tid);
  }
  launch.stop = true;
}

void refuse_grid(Launch& launch, uint64_t most) {
  const std::lock_guard<std::mutex> lock(results_mutex);
  Failure& failure = launch.result.failure;
  if (failure.failed) return;
  const std::string text = too_large(launch.order.size(), most);
  std::snprintf(failure.message, sizeof failure.message, "%s", text.c_str());
  failure.failed = 2;
  launch.stop = true;
}

void append_printed(Launch& launch, const std::string& text) {
  const std::lock_guard<std::mutex> lock(results_mutex);
  launch.printed += text;
}

void search_ranges(Thread& t, uint32_t site, uint64_t address, uint32_t bytes, uint32_t access,
                   uint8_t& hint) {
  for (int i = 0; i < kRanges; ++i) {
    const Range& range = t.ranges[i];
    if (address < range.begin || address - range.begin + bytes > range.bytes) continue;
    hint = static_cast<uint8_t>(i);
    return;
  }
  fail_bounds(t, site, kGlobal, address, bytes, access);
}

// Names the local array that the address is nearest to.
[[noreturn]] static void fail_local(Thread& t, uint32_t site, uint64_t address, uint32_t bytes,
                                    const char* what) {
  const LocalArray* array = t.arrays;
  if (!array) fail(t, site, "local memory %s: no function that runs has a local array", what);
  const auto outside = [&](const LocalArray& a) {
    return address < a.begin ? a.begin - address : address + bytes - (a.begin + a.bytes);
  };
  for (const LocalArray* outer = array->outer; outer; outer = outer->outer)
    if (outside(*outer) < outside(*array)) array = outer;
  fail(t, site,
       "local memory %s out of bounds: %u bytes at byte %lld of local arrays of %llu bytes", what,
       bytes, static_cast<long long>(address - array->begin),
       static_cast<unsigned long long>(array->bytes));
}

void fail_bounds(Thread& t, uint32_t site, Space space, uint64_t address, uint32_t bytes,
                 uint32_t access) {
  const char* what = access & kWrite ? "write" : "read";
  if (space == kShared)
    fail(t, site,
         "shared memory %s out of bounds: %u bytes at offset %lld, the block has %u bytes "
         "and its arrays have gaps between them",
         what, bytes, static_cast<long long>(address), t.block->shared_bytes);
  if (space == kLocal) fail_local(t, site, address, bytes, what);
  // Name the buffer that ends (or begins) nearest to the address.
  int nearest = -1;
  uint64_t distance = ~0ull;
  for (int i = 0; i < kRanges - 1; ++i) {
    const Range& range = t.ranges[i];
    if (!range.bytes) continue;
    const uint64_t gap = address < range.begin ? range.begin - address
                                               : address + bytes - (range.begin + range.bytes);
    if (gap < distance) distance = gap, nearest = i;
  }
  if (nearest < 0) fail(t, site, "global memory %s: the launch has no buffer at all", what);
  const Range& range = t.ranges[nearest];
  fail(t, site,
       "global memory %s out of bounds: %u bytes at byte %lld of buffer #%d, which has %llu", what,
       bytes, static_cast<long long>(address - range.begin), nearest,
       static_cast<unsigned long long>(range.bytes));
}

extern "C" EMULATOR_EXPORT int emulator_launch(const KernelInfo* kernel, const Request* request,
                                               Result* result) {
  try {
    check_request(*request, *kernel);
    Launch launch(*request, *kernel, *result);
    const FaultHandler handler;
    std::vector<std::thread> others;
    for (uint32_t i = 1; i < request->workers; ++i)
      others.emplace_back([&launch, request, i] { run_worker(launch, request->seed + i); });
    run_worker(launch, request->seed);
    for (std::thread& other : others) other.join();
    result->printed = strdup(launch.printed.c_str());
    if (launch.observer) launch.observer->list_races(*result);
  } catch (const std::string& reason) {
    std::snprintf(result->failure.message, sizeof result->failure.message, "%s", reason.c_str());
    result->failure.failed = 2;
  }
  return static_cast<int>(result->failure.failed);
}

extern "C" EMULATOR_EXPORT void emulator_free(void* memory) { std::free(memory); }

}  // namespace emulator
