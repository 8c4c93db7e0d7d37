// wgmma: the product of a 64 x 16 and a 16 x N matrix by the 128 threads of a warpgroup.
#include <algorithm>
#include <cstring>

#include "arithmetic.h"
#include "async.h"
#include "counters.h"
#include "memory.h"
#include "observer.h"

namespace emulator {

float element(Format format, uint16_t bits);
float element(Format format, uint32_t pair, int which);
uint32_t a_row(uint32_t lane, int reg);
uint32_t a_column(uint32_t lane, int reg, int which);

namespace {

constexpr uint32_t kM = 64, kDepth = 16, kThreads = kWarpgroupThreads, kMaxN = 256;

// Accumulator register i of a thread (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16").
uint32_t d_row(uint32_t thread, uint32_t i) {
  return 16 * (thread / 32) + thread % 32 / 4 + 8 * (i >> 1 & 1);
}
uint32_t d_column(uint32_t thread, uint32_t i) { return 8 * (i >> 2) + 2 * (thread % 4) + (i & 1); }

// A matrix descriptor: where a matrix lies in shared memory. `outer` is m or n.
struct Descriptor {
  uint32_t start, leading, stride, swizzle;

  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        swizzle((4 - (bits >> 62)) & 3) {}

  // k runs fastest ("K-major"): rows of `span` bytes, eight of them make an atom.
  uint32_t k_major(uint32_t outer, uint32_t k) const {
    const uint32_t atom = start + outer / 8 * stride;
    if (!swizzle) return atom + k / 8 * leading + outer % 8 * 16 + k % 8 * 2;
    return swizzled(swizzle, atom + outer % 8 * (16u << swizzle) + 2 * k);
  }
  // m or n runs fastest ("MN-major").
  uint32_t outer_major(uint32_t outer, uint32_t k) const {
    if (!swizzle) return start + outer / 8 * stride + k / 8 * leading + k % 8 * 16 + outer % 8 * 2;
    const uint32_t span = 16u << swizzle, elements = span / 2;
    return swizzled(swizzle, start + outer / elements * leading + k / 8 * stride + k % 8 * span +
                                 outer % elements * 2);
  }
};

struct Product {
  float a[kM][kDepth], b[kDepth][kMaxN], sums[kM][kMaxN];
};

float read_shared(Thread& t, uint32_t site, const Wgmma& shape, uint64_t descriptor,
                  bool outer_major, uint32_t outer, uint32_t k) {
  const Descriptor matrix(descriptor);
  const uint32_t offset = outer_major ? matrix.outer_major(outer, k) : matrix.k_major(outer, k);
  const char* at = shared_at<2, 0>(t, offset, site);
  Observer* const observer = block_of(t).launch->observer.get();
  // Late products are read when they are waited for, and who overwrites them before is found.
  if (observer && request_of(t).late_wgmma)
    observer->product_read(state(t), site, offset, 2);
  else
    observe(t, site, kShared, offset, 2, kRead | kUnrecorded);
  check_proxy(t, site, offset, 2, "wgmma");
  return element(shape.format, peek<uint16_t>(at));
}

void load_a(Thread& t, uint32_t site, const Wgmma& shape, uint64_t descriptor, const uint32_t* a,
            Product& product) {
  const float sign = shape.negate_a ? -1.0f : 1.0f;
  if (!a) {
    for (uint32_t m = 0; m < kM; ++m)
      for (uint32_t k = 0; k < kDepth; ++k)
        product.a[m][k] = sign * read_shared(t, site, shape, descriptor, shape.transpose_a, m, k);
    return;
  }
  for (uint32_t i = 0; i < kThreads * 8; ++i) {
    const uint32_t thread = i / 8, lane = thread % 32;
    const int reg = i / 2 % 4, which = i % 2;
    product.a[16 * (thread / 32) + a_row(lane, reg)][a_column(lane, reg, which)] =
        sign * element(shape.format, a[4 * thread + uint32_t(reg)], which);
  }
}

void multiply(Thread& t, const PendingWgmma& op) {
  static thread_local Product product;
  const Wgmma& shape = op.shape;
  load_a(t, op.site, shape, op.operands.a_descriptor, op.a.empty() ? nullptr : op.a.data(),
         product);
  const float sign = shape.negate_b ? -1.0f : 1.0f;
  for (uint32_t k = 0; k < kDepth; ++k)
    for (uint32_t n = 0; n < shape.n; ++n)
      product.b[k][n] =
          sign * read_shared(t, op.site, shape, op.operands.b_descriptor, shape.transpose_b, n, k);
  const auto each_sum = [&](auto&& visit) {
    for (uint32_t thread = 0; thread < kThreads; ++thread)
      for (uint32_t i = 0; i < shape.n / 2; ++i)
        visit(*op.d[thread][i], product.sums[d_row(thread, i)][d_column(thread, i)]);
  };
  if (op.operands.accumulate)
    each_sum([](uint32_t& reg, float& sum) { sum = __builtin_bit_cast(float, reg); });
  else
    std::memset(product.sums, 0, sizeof product.sums);
  for (uint32_t m = 0; m < kM; ++m)
    for (uint32_t k = 0; k < kDepth; ++k)
      for (uint32_t n = 0; n < shape.n; ++n)
        product.sums[m][n] += product.a[m][k] * product.b[k][n];
  each_sum([](uint32_t& reg, float& sum) { reg = __builtin_bit_cast(uint32_t, sum); });
  if (request_of(t).count) t.counts[kTensorOperations] += 2ull * kM * kDepth * shape.n;
}

WarpGroup& warpgroup_of(Thread& t) { return block_of(t).engine->warpgroups[t.index / kThreads]; }

// Like collective() for the 128 threads of a warpgroup.
template <class Leader>
void warpgroup_collective(Thread& t, const char* name, void* operands, uint32_t site,
                          Leader&& leader) {
  BlockState& block = block_of(t);
  WarpGroup& group = warpgroup_of(t);
  if ((t.index / kThreads + 1) * kThreads > block.thread_count)
    fail(t, site, "%s: the block's last %u threads are no whole warpgroup", name,
         block.thread_count % kThreads);
  if (group.arrived && (group.site != site || group.name != name))
    fail(t, site, "diverged warpgroup: thread %u is at %s while others wait at %s elsewhere",
         t.index, name, group.name);
  group.site = site, group.name = name;
  group.operands[t.index % kThreads] = operands;
  if (++group.arrived < kThreads) return wait(t, name, site);
  group.arrived = 0;
  leader(group);
  const uint32_t first = t.index / kThreads * 4;
  for (uint32_t w = 0; w < 4; ++w)
    make_ready(block.warps[first + w], first + w == t.warp->index ? ~(1u << t.lane) : ~0u);
}

void check_agreement(Thread& t, uint32_t site, const WarpGroup& group) {
  const auto& first = *static_cast<const WgmmaOperands*>(group.operands[0]);
  for (void* operands : group.operands) {
    const auto& other = *static_cast<const WgmmaOperands*>(operands);
    if (other.b_descriptor != first.b_descriptor || other.accumulate != first.accumulate ||
        (!first.a && other.a_descriptor != first.a_descriptor))
      fail(t, site, "wgmma: threads of the warpgroup disagree on descriptors or on scale-d");
  }
}

// The registers of all threads; pointers only, except a, which the ISA lets the program change.
PendingWgmma gather(const WarpGroup& group, uint32_t site, const Wgmma& shape) {
  PendingWgmma op{site, group.groups, shape, *static_cast<WgmmaOperands*>(group.operands[0]),
                  {},   {},           {}};
  for (void* each : group.operands) {
    const auto& operands = *static_cast<WgmmaOperands*>(each);
    op.d.emplace_back(operands.d, operands.d + shape.n / 2);
    if (operands.a) op.a.insert(op.a.end(), operands.a, operands.a + 4);
  }
  return op;
}

// Late: keep what the accumulators hold and put NaN there, unless an earlier product has done so.
void postpone(WarpGroup& group, PendingWgmma op) {
  const auto same = [&](const PendingWgmma& earlier) { return earlier.d[0] == op.d[0]; };
  if (std::none_of(group.pending.begin(), group.pending.end(), same))
    for (auto& registers : op.d) {
      op.initial.emplace_back();
      for (uint32_t* reg : registers) {
        op.initial.back().push_back(*reg);
        *reg = 0xffffffffu;
      }
    }
  group.pending.push_back(std::move(op));
}

void finish(Thread& t, PendingWgmma& op) {
  for (size_t thread = 0; thread < op.initial.size(); ++thread)
    for (size_t i = 0; i < op.initial[thread].size(); ++i) *op.d[thread][i] = op.initial[thread][i];
  multiply(t, op);
}

}  // namespace

void wgmma(Thread& t, uint32_t site, const Wgmma& shape, const WgmmaOperands& operands) {
  WgmmaOperands mine = operands;
  warpgroup_collective(t, "wgmma.mma_async", &mine, site, [&](WarpGroup& group) {
    check_agreement(t, site, group);
    PendingWgmma op = gather(group, site, shape);
    if (request_of(t).late_wgmma)
      postpone(group, std::move(op));
    else
      multiply(t, op);
  });
}

void commit_wgmma(Thread& t) {
  if (t.index % kThreads == 0) ++warpgroup_of(t).groups;
}

void wait_wgmma(Thread& t, uint32_t site, uint32_t groups_left) {
  if (!request_of(t).late_wgmma) return;
  warpgroup_collective(t, "wgmma.wait_group", nullptr, site, [&](WarpGroup& group) {
    Observer* const observer = block_of(t).launch->observer.get();
    if (observer) observer->begin_products(block_of(t), t.index / kThreads);
    size_t finished = 0;
    while (finished < group.pending.size() &&
           group.pending[finished].group + groups_left < group.groups)
      finish(t, group.pending[finished++]);
    group.pending.erase(group.pending.begin(),
                        group.pending.begin() + static_cast<ptrdiff_t>(finished));
    if (observer) observer->end_products(block_of(t), t.index / kThreads);
  });
}

}  // namespace emulator
