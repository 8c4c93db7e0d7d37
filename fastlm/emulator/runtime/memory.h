// Loads and stores of translated kernels: every access is checked for bounds and alignment.
#pragma once
#include "thread.h"

#ifndef EMULATOR_TRACED
#define EMULATOR_TRACED 0
#endif
#ifndef EMULATOR_ASYNC_PROXY
#define EMULATOR_ASYNC_PROXY 0
#endif

namespace emulator {

template <class T> inline T peek(const char* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}
template <class T> inline void poke(char* p, T value) { __builtin_memcpy(p, &value, sizeof value); }

// `hint` is the range this instruction hit last: nearly always the same tensor again.
template <uint32_t kBytes, uint32_t kAccess>
inline char* global_at(Thread& t, uint64_t address, uint32_t site, uint8_t& hint) {
  const Range& range = t.ranges[hint];
  const bool inside = address - range.begin + kBytes <= range.bytes && address >= range.begin;
  if (__builtin_expect(!inside, 0)) search_ranges(t, site, address, kBytes, kAccess, hint);
  if (__builtin_expect(address % kBytes != 0, 0))
    fail(t, site, "misaligned access: %u bytes at an address that is a multiple of %llu only",
         kBytes, static_cast<unsigned long long>(address & -address));
  if (EMULATOR_TRACED) observe(t, site, kGlobal, address, kBytes, kAccess);
  return reinterpret_cast<char*>(address);
}

template <uint32_t kBytes, uint32_t kAccess>
inline char* shared_at(Thread& t, uint64_t offset, uint32_t site) {
  const Block& block = *t.block;
  if (__builtin_expect(offset + kBytes > block.shared_bytes || offset > block.shared_bytes, 0))
    fail_bounds(t, site, kShared, offset, kBytes, kAccess);
  if (__builtin_expect(offset % kBytes != 0, 0))
    fail(t, site, "misaligned access: %u bytes at shared offset %llu", kBytes,
         static_cast<unsigned long long>(offset));
  if (EMULATOR_TRACED) observe(t, site, kShared, offset, kBytes, kAccess);
  if (EMULATOR_ASYNC_PROXY && (kAccess & kWrite))
    mark_generic_write(t, static_cast<uint32_t>(offset), kBytes);
  return block.shared + offset;
}

// Local memory is the fiber's own stack, where each array is known as long as its function runs.
template <uint32_t kBytes, uint32_t kAccess>
inline char* local_at(Thread& t, uint64_t address, uint32_t site) {
  const LocalArray* array = t.arrays;
  while (array && (address < array->begin || address - array->begin + kBytes > array->bytes))
    array = array->outer;
  if (__builtin_expect(!array, 0)) fail_bounds(t, site, kLocal, address, kBytes, kAccess);
  if (__builtin_expect(address % kBytes != 0, 0))
    fail(t, site, "misaligned access: %u bytes in local memory", kBytes);
  if (EMULATOR_TRACED) observe(t, site, kLocal, address, kBytes, kAccess);
  return reinterpret_cast<char*>(address);
}

// A generic address is a host address; those inside the block's shared memory are shared.
inline bool is_shared(const Thread& t, uint64_t address) {
  return address - reinterpret_cast<uint64_t>(t.block->shared) < t.block->shared_bytes;
}
inline bool is_local(const Thread& t, uint64_t address) { return address - t.stack < kStackBytes; }
// Parameter space begins at 0; what lies past its end is the host's address of a call's buffer.
inline uint64_t parameter_at(const char* parameters, uint32_t bytes, uint64_t address) {
  return address < bytes ? reinterpret_cast<uint64_t>(parameters) + address : address;
}
inline uint64_t shared_to_generic(const Thread& t, uint64_t offset) {
  return reinterpret_cast<uint64_t>(t.block->shared) + offset;
}
inline uint64_t generic_to_shared(const Thread& t, uint64_t address) {
  return address - reinterpret_cast<uint64_t>(t.block->shared);
}

template <uint32_t kBytes, uint32_t kAccess>
inline char* generic_at(Thread& t, uint64_t address, uint32_t site, uint8_t& hint) {
  if (is_shared(t, address))
    return shared_at<kBytes, kAccess>(t, generic_to_shared(t, address), site);
  if (is_local(t, address)) return local_at<kBytes, kAccess>(t, address, site);
  return global_at<kBytes, kAccess>(t, address, site, hint);
}

// Counts one trip round a loop; a thread that makes 2^28 of them without end is stuck.
inline void loop(Thread& t, uint32_t site) {
  if (__builtin_expect(--t.fuel < 0, 0)) fail_stuck(t, site);
}

}  // namespace emulator
