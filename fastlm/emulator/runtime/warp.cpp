#include "warp.h"

#include <algorithm>

#include "async.h"
#include "machine.h"
#include "observer.h"

namespace emulator {
namespace {

void release_barrier(BlockState& block, Barrier& barrier) {
  for (uint32_t w = 0; w * 32 < block.thread_count; ++w) {
    for (uint32_t set = barrier.waiting[w]; set; set &= set - 1) {
      ThreadState& t = block.threads[32 * w + uint32_t(__builtin_ctz(set))];
      if (block.launch->observer) t.clock.join(barrier.clock);
      publish_writes(t);
    }
    make_ready(block.warps[w], barrier.waiting[w]);
    barrier.waiting[w] = 0;
  }
  barrier.arrived = 0;
  barrier.last_votes = barrier.votes;
  barrier.votes = 0;
  barrier.clock = Clock{};
}

// Counts the calling thread in; true when it was the last that was waited for.
bool join_barrier(Thread& t, Barrier& barrier, uint32_t site, uint32_t count) {
  BlockState& block = block_of(t);
  const bool whole = count == 0 || count == block.thread_count;
  if (whole && block.alive != block.thread_count)
    fail(t, site, "barrier of the whole block after %u of its threads have exited",
         block.thread_count - block.alive);
  if (count % 32 && count != block.thread_count)
    fail(t, site, "barrier for %u threads: the count must be a multiple of the warp size", count);
  const uint32_t expected = count ? count : block.thread_count;
  if (barrier.arrived && barrier.expected != expected)
    fail(t, site, "threads disagree on the barrier's count: %u and %u", barrier.expected, expected);
  barrier.expected = expected;
  if (Observer* observer = block.launch->observer.get()) observer->release(state(t), barrier.clock);
  progress(t);
  return ++barrier.arrived == expected;
}

template <class T> T combine(char operation, T a, T b) {
  switch (operation) {
    case '+': return T(uint32_t(a) + uint32_t(b));
    case '<': return std::min(a, b);
    case '>': return std::max(a, b);
    case '&': return T(a & b);
    case '|': return T(a | b);
    default: return T(a ^ b);
  }
}

template <class T>
T reduce_lanes(Thread& t, uint32_t site, char operation, T value, uint32_t mask) {
  collective(t, "redux.sync", mask, &value, site, false, [&](void** operands, uint32_t lanes) {
    T total = *static_cast<T*>(operands[__builtin_ctz(lanes)]);
    for (uint32_t set = lanes & (lanes - 1); set; set &= set - 1)
      total = combine(operation, total, *static_cast<T*>(operands[__builtin_ctz(set)]));
    for (uint32_t set = lanes; set; set &= set - 1)
      *static_cast<T*>(operands[__builtin_ctz(set)]) = total;
  });
  return value;
}

}  // namespace

bool arrive(Thread& t, const char* name, uint32_t mask, void* operands, uint32_t site, bool aligned,
            Collective*& slot) {
  Warp& warp = *t.warp;
  const uint32_t me = 1u << t.lane;
  Collective *mine = nullptr, *unused = nullptr;
  for (Collective& candidate : warp.slots) {
    if (candidate.arrived && (candidate.mask & me)) mine = &candidate;
    if (!candidate.arrived) unused = &candidate;
  }
  if (!mine) {
    if (!(mask & me))
      fail(t, site, "%s: lane %u calls but is not in mask %08x", name, t.lane, mask);
    if (mask & ~warp.live)
      fail(t, site, "%s: mask %08x names lanes %08x that have exited or do not exist", name, mask,
           mask & ~warp.live);
    if (!unused) fail(t, site, "%s: more than four overlapping warp operations", name);
    mine = unused;
    *mine = Collective{name, mask, 0, site, {}};
  } else if (mine->name != name || (aligned && mine->site != site)) {
    fail(t, site, "diverged warp: lane %u is at %s while lanes %08x wait at %s%s", t.lane, name,
         mine->arrived, mine->name, mine->name == name ? " elsewhere in the kernel" : "");
  } else if (mine->mask != mask) {
    fail(t, site, "%s: lanes disagree on the mask, %08x and %08x", name, mine->mask, mask);
  }
  mine->operands[t.lane] = operands;
  mine->arrived |= me;
  slot = mine;
  return mine->arrived == mask;
}

uint32_t barrier_sync(Thread& t, uint32_t site, bool aligned, uint32_t id, uint32_t count,
                      bool predicate) {
  BlockState& block = block_of(t);
  Barrier& barrier = block.barriers[id & 15];
  const uint32_t w = t.warp->index;
  if (aligned && barrier.waiting[w] && barrier.site[w] != site)
    fail(t, site, "diverged barrier: other lanes of this warp wait in a different bar.sync");
  barrier.site[w] = site;
  barrier.votes += predicate;
  if (join_barrier(t, barrier, site, count)) {
    if (block.launch->observer) state(t).clock.join(barrier.clock);
    publish_writes(state(t));
    release_barrier(block, barrier);
  } else {
    barrier.waiting[w] |= 1u << t.lane;
    wait(t, "bar.sync", site);
  }
  return barrier.last_votes;
}

void barrier_arrive(Thread& t, uint32_t site, uint32_t id, uint32_t count) {
  BlockState& block = block_of(t);
  Barrier& barrier = block.barriers[id & 15];
  if (join_barrier(t, barrier, site, count)) release_barrier(block, barrier);
}

void warp_sync(Thread& t, uint32_t site, uint32_t mask) {
  collective(t, "bar.warp.sync", mask, &t, site, false, [&](void** threads, uint32_t lanes) {
    const auto each = [&](auto&& visit) {
      for (uint32_t set = lanes; set; set &= set - 1)
        visit(state(*static_cast<Thread*>(threads[__builtin_ctz(set)])));
    };
    each(publish_writes);
    Observer* observer = block_of(t).launch->observer.get();
    if (!observer) return;
    Clock together;
    each([&](ThreadState& lane) { observer->release(lane, together); });
    each([&](ThreadState& lane) { lane.clock.join(together); });
  });
}

void fence(Thread& t, bool block_scope) {
  if (Observer* observer = block_of(t).launch->observer.get())
    observer->fence(state(t), block_scope);
}

uint32_t shuffle(Thread& t, uint32_t site, char mode, uint32_t value, uint32_t lane, uint32_t clamp,
                 uint32_t mask, bool& valid) {
  // As in the ISA: `segment` bits pick the sub-warp, `limit` is the last (or first) lane in it.
  const uint32_t segment = clamp >> 8 & 31, bound = clamp & 31, b = lane & 31;
  const uint32_t limit = (t.lane & segment) | (bound & ~segment), first = t.lane & segment;
  int source;
  if (mode == 'u')
    source = int(t.lane) - int(b), valid = source >= int(limit);
  else if (mode == 'd')
    source = int(t.lane + b), valid = source <= int(limit);
  else if (mode == 'b')
    source = int(t.lane ^ b), valid = source <= int(limit);
  else
    source = int(first | (b & ~segment)), valid = source <= int(limit);
  if (!valid) source = int(t.lane);

  struct Operands {
    uint32_t value, result;
    int source;
  } mine{value, 0, source};
  if (!(mask >> source & 1))
    fail(t, site, "shfl.sync: lane %u reads lane %d, which is not in mask %08x", t.lane, source,
         mask);
  collective(t, "shfl.sync", mask, &mine, site, false, [](void** operands, uint32_t lanes) {
    for (uint32_t set = lanes; set; set &= set - 1) {
      auto& to = *static_cast<Operands*>(operands[__builtin_ctz(set)]);
      to.result = static_cast<Operands*>(operands[to.source])->value;
    }
  });
  return mine.result;
}

uint32_t ballot(Thread& t, uint32_t site, bool predicate, uint32_t mask) {
  uint32_t mine = predicate;
  collective(t, "vote.sync", mask, &mine, site, false, [](void** operands, uint32_t lanes) {
    uint32_t votes = 0;
    for (uint32_t set = lanes; set; set &= set - 1) {
      const int lane = __builtin_ctz(set);
      votes |= *static_cast<uint32_t*>(operands[lane]) << lane;
    }
    for (uint32_t set = lanes; set; set &= set - 1)
      *static_cast<uint32_t*>(operands[__builtin_ctz(set)]) = votes;
  });
  return mine;
}

uint32_t match_any(Thread& t, uint32_t site, uint64_t value, uint32_t mask) {
  struct Operands {
    uint64_t value;
    uint32_t same;
  } mine{value, 0};
  collective(t, "match.sync", mask, &mine, site, false, [](void** operands, uint32_t lanes) {
    for (uint32_t set = lanes; set; set &= set - 1) {
      auto& to = *static_cast<Operands*>(operands[__builtin_ctz(set)]);
      for (uint32_t other = lanes; other; other &= other - 1) {
        const int lane = __builtin_ctz(other);
        if (static_cast<Operands*>(operands[lane])->value == to.value) to.same |= 1u << lane;
      }
    }
  });
  return mine.same;
}

uint32_t match_all(Thread& t, uint32_t site, uint64_t value, uint32_t mask, bool& all) {
  all = match_any(t, site, value, mask) == mask;
  return all ? mask : 0;
}

uint32_t reduce(Thread& t, uint32_t site, char operation, uint32_t value, uint32_t mask) {
  return reduce_lanes(t, site, operation, value, mask);
}
int32_t reduce(Thread& t, uint32_t site, char operation, int32_t value, uint32_t mask) {
  return reduce_lanes(t, site, operation, value, mask);
}

bool elect(Thread& t, uint32_t site, uint32_t mask, uint32_t& leader) {
  leader = static_cast<uint32_t>(__builtin_ctz(ballot(t, site, true, mask)));
  return t.lane == leader;
}

// An over-estimate: lanes that have taken another branch are counted too, as the ISA allows.
uint32_t active_mask(Thread& t) { return t.warp->live; }

}  // namespace emulator
