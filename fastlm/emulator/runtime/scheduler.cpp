#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "async.h"
#include "machine.h"
#include "observer.h"

namespace emulator {
namespace {

constexpr uint32_t kSpinTurns = 1u << 28;   // trips round loops before a thread is called stuck
constexpr size_t kArenaBytes = 256 * 1024;  // more than any GPU's shared memory of a block
constexpr size_t kArenaAlignment = 1024;    // swizzles repeat every 1024 bytes

const char* const kPolling = "a loop that waits for other threads";

thread_local Worker* active_worker = nullptr;

// Runs one CUDA thread after the other, for ever: a fiber is reused by the next block.
void fiber_main() {
  ThreadState& t = *active_worker->current;
  Worker& worker = *t.home->worker;
  for (;;) {
    const Launch& launch = worker.launch;
    launch.kernel.run(t, static_cast<const char*>(launch.request.parameters));
    finish_thread(t);
    ThreadState* next = worker.pick();
    if (next != &t) worker.switch_to(next);
  }
}

uint32_t site_of(const Barrier& barrier) {
  for (int w = 0; w < 32; ++w)
    if (barrier.waiting[w]) return barrier.site[w];
  return 0;
}

}  // namespace

BlockState::BlockState(Worker& worker, Launch& launch, uint32_t thread_count)
    : Block{},
      worker(&worker),
      launch(&launch),
      thread_count(thread_count),
      threads(new ThreadState[thread_count]()),
      engine(new AsyncEngine) {
  arena = static_cast<char*>(std::aligned_alloc(kArenaAlignment, kArenaBytes));
  const Request& request = launch.request;
  shared = arena;
  dynamic_bytes = request.dynamic_shared;
  grid_workspace = reinterpret_cast<uint64_t>(launch.grid_workspace);
  uint32_t begin = launch.kernel.static_shared;
  const uint32_t alignment = launch.kernel.dynamic_alignment;
  if (dynamic_bytes) begin = (begin + alignment - 1) / alignment * alignment;
  shared_bytes = begin + dynamic_bytes;
  std::memcpy(ntid, request.block, sizeof ntid);
  std::memcpy(nctaid, request.grid, sizeof nctaid);
  for (uint32_t i = 0; i < thread_count; ++i) {
    ThreadState& t = threads[i];
    t.ranges = launch.ranges;
    t.block = this, t.home = this;
    t.index = i, t.lane = i % 32, t.warp = &warps[i / 32];
    t.tid[0] = i % ntid[0], t.tid[1] = i / ntid[0] % ntid[1], t.tid[2] = i / (ntid[0] * ntid[1]);
    t.stack_memory = acquire_stack();
    t.stack = reinterpret_cast<uint64_t>(t.stack_memory);
    t.counts = launch.result.counters;
    make_context(t.context, t.stack_memory, &fiber_main);
  }
}

BlockState::~BlockState() {
  for (uint32_t i = 0; i < thread_count; ++i) release_stack(threads[i].stack_memory);
  std::free(arena);
}

void BlockState::start(uint64_t linear) {
  number = linear;
  ctaid[0] = static_cast<uint32_t>(linear % nctaid[0]);
  ctaid[1] = static_cast<uint32_t>(linear / nctaid[0] % nctaid[1]);
  ctaid[2] = static_cast<uint32_t>(linear / (uint64_t(nctaid[0]) * nctaid[1]));
  alive = thread_count;
  ready_warps = spinning_warps = 0;
  std::memset(shared, 0xff, shared_bytes);  // NaN in every float type: a read too early shows
  generic_writer.clear();
  *engine = AsyncEngine{};
  for (Barrier& barrier : barriers) barrier = Barrier{};
  for (uint32_t w = 0; w * 32 < thread_count; ++w) {
    const uint32_t lanes = thread_count - 32 * w;
    warps[w] = Warp{};
    warps[w].block = this, warps[w].index = w;
    warps[w].live = lanes >= 32 ? ~0u : (1u << lanes) - 1;
    make_ready(warps[w], warps[w].live);
  }
  for (uint32_t i = 0; i < thread_count; ++i) {
    threads[i].done = false;
    threads[i].fuel = kSpinTurns;
    threads[i].arrays = nullptr;
    threads[i].copies.clear(), threads[i].copy_groups.clear();
  }
  if (launch->observer) launch->observer->start_block(*this);
}

void make_ready(Warp& warp, uint32_t lanes) {
  if (!lanes) return;
  warp.ready |= lanes;
  warp.block->ready_warps |= 1u << warp.index;
}

void wait(Thread& t, const char* what, uint32_t site) {
  ThreadState& self = state(t);
  self.waiting_for = what, self.waiting_site = site;
  if (Observer* observer = self.home->launch->observer.get()) observer->settle(self);
  Worker& worker = *self.home->worker;
  ThreadState* next = worker.pick();
  if (next != &self) worker.switch_to(next);
}

void spin(Thread& t, uint32_t site) {
  --t.fuel;  // also what %clock shows: a loop that waits for time to pass ends
  Warp& warp = *t.warp;
  warp.spinning |= 1u << t.lane;
  warp.block->spinning_warps |= 1u << warp.index;
  wait(t, kPolling, site);
}

void finish_thread(ThreadState& t) {
  finish_copies(t);
  if (Observer* observer = t.home->launch->observer.get()) observer->settle(t);
  BlockState& block = *t.home;
  Warp& warp = *t.warp;
  const uint32_t me = 1u << t.lane;
  warp.live &= ~me;
  for (const Collective& slot : warp.slots)
    if (slot.arrived && (slot.mask & me))
      fail(t, slot.site, "lane %u exits while lanes %08x wait for it in %s", t.lane, slot.arrived,
           slot.name);
  for (const Barrier& barrier : block.barriers)
    if (barrier.arrived && barrier.expected == block.thread_count)
      fail(t, site_of(barrier),
           "a thread exits while %u others wait in a barrier of the whole "
           "block: not every thread reaches it",
           barrier.arrived);
  t.done = true;
  progress(t);
  if (--block.alive == 0 && block.launch->observer) block.launch->observer->finish_block(block);
}

Worker::~Worker() = default;

uint32_t Worker::random(uint32_t bound) {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<uint32_t>(random_state >> 33) % bound;
}

uint32_t Worker::choose(uint32_t set) {
  switch (static_cast<Schedule>(launch.request.schedule)) {
    case Schedule::kOrder: return static_cast<uint32_t>(__builtin_ctz(set));
    case Schedule::kReverse: return 31 - static_cast<uint32_t>(__builtin_clz(set));
    case Schedule::kRandom: break;
  }
  for (uint32_t skip = random(static_cast<uint32_t>(__builtin_popcount(set))); skip; --skip)
    set &= set - 1;
  return static_cast<uint32_t>(__builtin_ctz(set));
}

ThreadState* Worker::pick_in(BlockState& candidate) {
  // Unless the schedule is random, stay in the running warp: lanes then meet in collectives sooner.
  const bool stay = launch.request.schedule != uint32_t(Schedule::kRandom) && current &&
                    current->home == &candidate && current->warp->ready;
  Warp& warp = stay ? *current->warp : candidate.warps[choose(candidate.ready_warps)];
  const uint32_t lane = choose(warp.ready);
  warp.ready &= ~(1u << lane);
  if (!warp.ready) candidate.ready_warps &= ~(1u << warp.index);
  block = &candidate;
  return &candidate.threads[32 * warp.index + lane];
}

bool Worker::start_block() {
  if (resident.size() >= most_resident || launch.next >= launch.order.size()) return false;
  if (idle.empty()) {
    const uint32_t* size = launch.request.block;
    try {
      idle.push_back(std::make_unique<BlockState>(*this, launch, size[0] * size[1] * size[2]));
    } catch (const std::bad_alloc&) {
      most_resident = resident.size();  // no stacks for another; the first one always fits
      if (launch.kernel.synchronizes_grid) refuse_grid(launch, most_resident);
      return false;
    }
  }
  const uint64_t turn = launch.next.fetch_add(1);
  if (turn >= launch.order.size()) return false;
  resident.push_back(std::move(idle.back()));
  idle.pop_back();
  resident.back()->start(launch.order[turn]);
  return true;
}

bool Worker::heard_progress() {
  const uint64_t now = launch.progress.load(std::memory_order_relaxed);
  const bool news = now != progress_seen;
  if (news) progress_seen = now, spins = 0;
  return news;
}

size_t Worker::wake_spinners() {
  size_t blocks = 0;
  for (auto& candidate : resident) {
    blocks += candidate->spinning_warps != 0;
    for (uint32_t set = candidate->spinning_warps; set; set &= set - 1) {
      Warp& warp = candidate->warps[__builtin_ctz(set)];
      spins += static_cast<uint64_t>(__builtin_popcount(warp.spinning));
      make_ready(warp, warp.spinning);
      warp.spinning = 0;
    }
    candidate->spinning_warps = 0;
  }
  return blocks;
}

void Worker::retire_blocks() {
  for (size_t i = 0; i < resident.size();) {
    if (resident[i]->alive) {
      ++i;
      continue;
    }
    idle.push_back(std::move(resident[i]));
    resident.erase(resident.begin() + static_cast<ptrdiff_t>(i));
  }
}

// The thread to run next, or null when every block has finished or nothing can ever run again.
ThreadState* Worker::pick() {
  if (block && block->ready_warps) return pick_in(*block);
  retire_blocks();
  for (;;) {
    if (launch.stop) return nullptr;
    // A block in which every thread is blocked is a deadlock: no other block can help it.
    bool deadlocked = false;
    for (size_t i = 0; i < resident.size(); ++i) {
      if (place >= resident.size()) place = 0;
      BlockState& candidate = *resident[place];
      if (candidate.ready_warps) return pick_in(candidate);
      deadlocked |= !candidate.spinning_warps;
      ++place;
    }
    if (deadlocked) return nullptr;
    // After any progress the spinning threads may go on. Where all blocks wait for all, they would
    // look up once for each block that starts: so the more look up, the more start in between.
    news |= heard_progress();
    if (news && starts && start_block()) {
      --starts;
      continue;
    }
    if (news) {
      news = false;
      starts = wake_spinners();
      if (starts) continue;
    }
    if (start_block()) continue;
    if (spins > launch.request.spin_limit || !wake_spinners()) return nullptr;
  }
}

void Worker::switch_to(ThreadState* next) {
  Context& from = current ? current->context : main;
  current = next;
  switch_context(from, next ? next->context : main);
}

void Worker::run() {
  active_worker = this;
  if (ThreadState* first = pick()) switch_to(first);
  current = nullptr;
  if (!launch.stop) report_deadlock();
}

void Worker::report_deadlock() {
  const bool is_livelock = spins > launch.request.spin_limit;
  std::map<std::string, uint32_t> reasons;
  ThreadState* stuck = nullptr;
  for (auto& candidate : resident)
    for (uint32_t i = 0; i < candidate->thread_count && candidate->alive; ++i) {
      ThreadState& t = candidate->threads[i];
      if (t.done) continue;
      ++reasons[t.waiting_for];
      // Of a livelock, a thread that polls tells more than those that wait for it.
      if (!stuck || (is_livelock && t.waiting_for == kPolling && stuck->waiting_for != kPolling))
        stuck = &t;
    }
  if (!stuck) return;
  std::string text = is_livelock ? "livelock:" : "deadlock:";
  for (auto& [what, count] : reasons)
    text += " " + std::to_string(count) + " threads in " + what + ",";
  text.back() = ' ';
  text += "and nothing left to run";
  if (const uint64_t waiting =
          launch.order.size() - std::min(launch.order.size(), launch.next.load()))
    text += "; " + std::to_string(waiting) + " blocks have not started: at most " +
            std::to_string(most_resident) + " are resident";
  record_failure(*stuck, stuck->waiting_site, 0, text);
}

void leave(Thread& t) {
  block_of(t).worker->switch_to(nullptr);
  std::abort();  // nobody switches back to a thread that failed
}

void fail(Thread& t, uint32_t site, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  record_failure(t, site, 0, text);
  leave(t);
}

void fail_stuck(Thread& t, uint32_t site) {
  fail(t, site, "livelock: one thread went round its loops 2^28 times");
}

}  // namespace emulator
