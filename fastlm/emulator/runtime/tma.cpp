// TMA: tensor boxes with swizzle and zero fill, plain bulk copies, and their completion.
#include <algorithm>
#include <cstring>

#include "async.h"
#include "memory.h"

namespace emulator {

// 128-, 64- or 32-byte swizzle: address bits 4.. are changed by bits 7.. (PTX ISA, "Swizzling").
uint32_t swizzled(uint32_t mode, uint32_t address) {
  if (mode == 0) return address;
  const uint32_t bits = (1u << mode) - 1;
  return address ^ ((address >> 7 & bits) << 4);
}

namespace {

constexpr uint32_t kElementTypes = 11;
// In the order of tensormap.replace's elemtype: u8 u16 u32 s32 u64 s64 f16 f32 f32.ftz f64 bf16.
constexpr uint32_t kElementBytes[kElementTypes] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2};

void check_map(Thread& t, const BulkCopy& copy) {
  const TensorMap& map = copy.map;
  if (map.element_type >= kElementTypes || map.interleave || map.swizzle > 3)
    fail(t, copy.site, "tensor map: element type %u, interleave %u, swizzle %u not known",
         map.element_type, map.interleave, map.swizzle);
  if (map.rank_minus_one + 1 != copy.rank)
    fail(t, copy.site, "tensor map of rank %u used by a %u-dimensional copy",
         map.rank_minus_one + 1, copy.rank);
  const uint32_t row = map.box[0] * kElementBytes[map.element_type];
  if (map.swizzle && row > 16u << map.swizzle)
    fail(t, copy.site, "tensor map: rows of %u bytes do not fit a swizzle of %u", row,
         16u << map.swizzle);
  if (row % 16) fail(t, copy.site, "tensor map: box rows of %u bytes, not a multiple of 16", row);
  if (map.address % 16) fail(t, copy.site, "tensor map: global address not a multiple of 16");
  for (uint32_t i = 1; i < copy.rank; ++i)
    if (map.strides[i - 1] % 16)
      fail(t, copy.site, "tensor map: stride %u is %llu bytes, not a multiple of 16", i,
           static_cast<unsigned long long>(map.strides[i - 1]));
  if (copy.shared % 128) fail(t, copy.site, "tensor copy: shared address not a multiple of 128");
}

void move_element(Thread& t, const BulkCopy& copy, uint32_t offset, uint64_t global, bool inside,
                  uint32_t bytes) {
  char* shared = t.block->shared + offset;
  if (!copy.to_shared) {
    if (!inside) return;  // elements outside the tensor are not stored
    check_proxy(t, copy.site, offset, bytes, "TMA store");
    std::memcpy(reinterpret_cast<char*>(global), shared, bytes);
  } else if (inside) {
    std::memcpy(shared, reinterpret_cast<const char*>(global), bytes);
  } else {
    std::memset(shared, 0, bytes);
  }
}

// One row of the box: dimension 0. `begin` is where the row starts if dimension 0 started at 0.
void move_row(Thread& t, const BulkCopy& copy, uint32_t row, bool inside, uint64_t begin) {
  const TensorMap& map = copy.map;
  const uint32_t bytes = kElementBytes[map.element_type];
  for (uint32_t e = 0; e < map.box[0]; ++e) {
    const int64_t at = int64_t(copy.coordinates[0]) + e;
    const bool live = inside && at >= 0 && at < int64_t(map.dims[0]);
    const uint32_t offset = swizzled(map.swizzle, copy.shared + (row * map.box[0] + e) * bytes);
    uint8_t hint = 0;
    if (live && e == 0)
      search_ranges(t, copy.site, begin + at * bytes, bytes, copy.to_shared ? kRead : kWrite, hint);
    move_element(t, copy, offset, begin + at * bytes, live, bytes);
  }
}

// visit(row, whether it lies in the tensor, begin) for each row of the box.
template <class Visit> void each_row(const BulkCopy& copy, Visit&& visit) {
  const TensorMap& map = copy.map;
  uint32_t rows = 1;
  for (uint32_t i = 1; i < copy.rank; ++i) rows *= map.box[i];
  for (uint32_t row = 0; row < rows; ++row) {
    uint32_t rest = row;
    uint64_t begin = map.address;
    bool inside = true;
    for (uint32_t i = 1; i < copy.rank; ++i) {
      const int64_t at = int64_t(copy.coordinates[i]) + rest % map.box[i];
      rest /= map.box[i];
      inside &= at >= 0 && at < int64_t(map.dims[i]);
      begin += static_cast<uint64_t>(at) * map.strides[i - 1];
    }
    visit(row, inside, begin);
  }
}

// Loads are seen when they are issued, by the thread that may have waited for what they read.
void observe_box(Thread& t, const BulkCopy& copy) {
  const uint32_t bytes = kElementBytes[copy.map.element_type];
  each_row(copy, [&](uint32_t, bool inside, uint64_t begin) {
    const int64_t first = std::max<int64_t>(0, copy.coordinates[0]);
    const int64_t end =
        std::min<int64_t>(copy.map.dims[0], int64_t(copy.coordinates[0]) + copy.map.box[0]);
    if (inside && first < end)
      observe(t, copy.site, kGlobal, begin + uint64_t(first) * bytes, uint32_t(end - first) * bytes,
              (copy.to_shared ? kRead : kWrite) | kTensorCopy);
  });
}

void move(Thread& t, const BulkCopy& copy) {
  if (copy.tensor) {
    if (!copy.to_shared) observe_box(t, copy);
    return each_row(copy, [&](uint32_t row, bool inside, uint64_t begin) {
      move_row(t, copy, row, inside, begin);
    });
  }
  char* shared = t.block->shared + copy.shared;
  char* global = reinterpret_cast<char*>(copy.global);
  if (!copy.to_shared) check_proxy(t, copy.site, copy.shared, copy.bytes, "bulk store");
  if (copy.adds) {
    for (uint32_t at = 0; at < copy.bytes; at += 4) {
      const float sum = peek<float>(global + at) + peek<float>(shared + at);
      std::memcpy(global + at, &sum, sizeof sum);
    }
    return;
  }
  std::memcpy(copy.to_shared ? shared : global, copy.to_shared ? global : shared, copy.bytes);
}

void finish_load(Thread& t, const BulkCopy& copy) {
  move(t, copy);
  observe_landing(t, copy.shared, copy.bytes);
  mbarrier_landed(t, copy.site, copy.mbarrier, copy.bytes);
}

void start(Thread& t, BulkCopy copy) {
  if (uint64_t(copy.shared) + copy.bytes > t.block->shared_bytes)
    fail_bounds(t, copy.site, kShared, copy.shared, copy.bytes, copy.to_shared ? kWrite : kRead);
  const uint32_t access = copy.to_shared ? kWrite | kInFlight : kRead;
  observe(t, copy.site, kShared, copy.shared, copy.bytes, access);
  AsyncEngine& engine = *block_of(t).engine;
  const bool late = request_of(t).late_copies;
  if (!copy.to_shared) {
    copy.issuer = t.index;
    copy.group = engine.store_groups[t.index];
    if (!late)
      move(t, copy);
    else
      engine.stores.push_back(copy);
    return;
  }
  if (copy.tensor) observe_box(t, copy);
  mbarrier_issued(t, copy.mbarrier);
  clear_generic_writes(block_of(t), copy.shared, copy.bytes);
  if (!late) return finish_load(t, copy);
  std::memset(t.block->shared + copy.shared, 0xff, copy.bytes);
  engine.loads.push_back(copy);
}

BulkCopy tensor_copy(Thread& t, uint32_t site, uint64_t map, uint32_t rank,
                     const int32_t* coordinates, uint64_t shared) {
  BulkCopy copy{};
  copy.tensor = true, copy.site = site, copy.rank = rank, copy.shared = uint32_t(shared);
  std::memcpy(static_cast<void*>(&copy.map), reinterpret_cast<const void*>(map), sizeof copy.map);
  std::memcpy(copy.coordinates, coordinates, rank * sizeof *coordinates);
  check_map(t, copy);
  copy.bytes = kElementBytes[copy.map.element_type];
  for (uint32_t i = 0; i < rank; ++i) copy.bytes *= copy.map.box[i];
  return copy;
}

BulkCopy bulk_copy(Thread& t, uint32_t site, uint64_t shared, uint64_t global, uint32_t bytes,
                   uint32_t access) {
  if (bytes % 16 || shared % 16 || global % 16)
    fail(t, site, "bulk copy: size and both addresses must be multiples of 16");
  uint8_t hint = 0;
  search_ranges(t, site, global, bytes, access, hint);
  observe(t, site, kGlobal, global, bytes, access);
  BulkCopy copy{};
  copy.site = site, copy.shared = uint32_t(shared), copy.global = global, copy.bytes = bytes;
  return copy;
}

}  // namespace

void tensor_load(Thread& t, uint32_t site, uint64_t shared, uint64_t map, uint32_t rank,
                 const int32_t* coordinates, uint64_t mbarrier) {
  BulkCopy copy = tensor_copy(t, site, map, rank, coordinates, shared);
  copy.to_shared = true, copy.mbarrier = uint32_t(mbarrier);
  start(t, copy);
}

void tensor_store(Thread& t, uint32_t site, uint64_t map, uint32_t rank, const int32_t* coordinates,
                  uint64_t shared) {
  start(t, tensor_copy(t, site, map, rank, coordinates, shared));
}

void bulk_load(Thread& t, uint32_t site, uint64_t shared, uint64_t global, uint32_t bytes,
               uint64_t mbarrier) {
  BulkCopy copy = bulk_copy(t, site, shared, global, bytes, kRead);
  copy.to_shared = true, copy.mbarrier = uint32_t(mbarrier);
  start(t, copy);
}

void bulk_store(Thread& t, uint32_t site, uint64_t global, uint64_t shared, uint32_t bytes,
                bool adds) {
  BulkCopy copy = bulk_copy(t, site, shared, global, bytes, adds ? kRead | kWrite : kWrite);
  copy.adds = adds;
  start(t, copy);
}

void commit_bulk(Thread& t) { ++block_of(t).engine->store_groups[t.index]; }

void wait_bulk(Thread& t, uint32_t groups_left) {
  AsyncEngine& engine = *block_of(t).engine;
  const uint32_t committed = engine.store_groups[t.index];
  std::vector<BulkCopy> later;
  for (const BulkCopy& store : engine.stores)
    if (store.issuer == t.index && store.group + groups_left < committed)
      move(t, store);
    else
      later.push_back(store);
  engine.stores = std::move(later);
}

void land_loads(Thread& t, uint32_t mbarrier) {
  AsyncEngine& engine = *block_of(t).engine;
  std::vector<BulkCopy> landing, later;
  for (const BulkCopy& load : engine.loads)
    (load.mbarrier == mbarrier ? landing : later).push_back(load);
  engine.loads = std::move(later);
  for (const BulkCopy& load : landing) finish_load(t, load);
}

void tensor_map_replace(Thread& t, uint32_t site, char* at, const char* field, uint32_t ordinal,
                        uint64_t value) {
  TensorMap map;
  std::memcpy(static_cast<void*>(&map), at, sizeof map);
  const auto is = [&](const char* name) { return std::strcmp(field, name) == 0; };
  if (ordinal > 4) fail(t, site, "tensormap.replace: dimension %u", ordinal);
  const auto small = static_cast<uint32_t>(value);
  if (is("global_address"))
    map.address = value;
  else if (is("global_stride"))
    map.strides[ordinal] = value;
  else if (is("global_dim"))
    map.dims[ordinal] = small;
  else if (is("box_dim"))
    map.box[ordinal] = small;
  else if (is("element_stride"))
    map.element_strides[ordinal] = small;
  else if (is("rank"))
    map.rank_minus_one = small;
  else if (is("elemtype"))
    map.element_type = small;
  else if (is("interleave_layout"))
    map.interleave = small;
  else if (is("swizzle_mode"))
    map.swizzle = small;
  else
    map.fill = small;
  std::memcpy(at, static_cast<const void*>(&map), sizeof map);
}

void tensor_map_copy(Thread& t, uint32_t site, char* to, const char* from) {
  struct Operands {
    char* to;
    const char* from;
  } mine{to, from};
  collective(t, "tensormap.cp_fenceproxy", t.warp->live, &mine, site, true,
             [](void** all, uint32_t set) {
               const auto& first = *static_cast<Operands*>(all[__builtin_ctz(set)]);
               std::memcpy(first.to, first.from, sizeof(TensorMap));
             });
}

}  // namespace emulator
