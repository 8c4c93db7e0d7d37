// The logits of linear_cross_entropy, a tile of classes at a time: how wide a tile is, what it has
// of each operand, and the product that makes its logits.
#pragma once

#include "../linear_cross_entropy.h"
#include "arena.h"
#include "cross_entropy_rows.h"
#include "parallel.h"
#include "product_panels.h"

namespace fastlm::cpu::FASTLM_ISA {

// Of a tile's weight: packed, it stays in an L2 cache. And at N = 1024, C = 768 all that backward
// holds for bfloat16 on two threads fits in input's gradient, where the first operands are not
// Units (they are packed, in float32) too.
template <class T> constexpr int64_t kTileBytes = rows_are_units<T>(2, 2) ? 393216 : 344064;

template <class T> class TiledLogits {
  using A = acc_t<T>;
  using S = stored_t<T>;

 public:
  // Rows that are made at a time: few, so that their logits are in the cache when the softmax reads
  // them, and another thread can take what one has not begun.
  static constexpr int64_t kFewRows = kRows<A> / 2;

  const LinearCrossEntropy& p;
  const T *const x, *const linear_weight;
  const int64_t threads, width, tiles, last_width, row_blocks;
  const Slabs of_features;
  const int64_t kept_rows;  // of a whole tile: the last may have room for fewer
  const bool again;         // whether backward makes logits
  double sum_of_weights = 0;
  A* target_logits = nullptr;  // (rows), after the softcap: what forward found

  TiledLogits(const LinearCrossEntropy& p, int64_t threads)
      : p(p),
        x(static_cast<const T*>(p.x)),
        linear_weight(static_cast<const T*>(p.linear_weight)),
        threads(p.rows * p.features * p.classes < kWorthATeam ? 1 : threads),
        width(width_of(p)),
        tiles(ceil_div(p.classes, width)),
        last_width(p.classes - (tiles - 1) * width),
        row_blocks(ceil_div(p.rows, kFewRows)),
        of_features(Slabs::of<T>(p.features)),
        kept_rows(kept_rows_of(width)),
        again(kept_rows < p.rows || kept_rows_of(last_width) < p.rows) {
    if (!p.weight) sum_of_weights = double(p.classes);
    for (int64_t c = 0; p.weight && c < p.classes; ++c) sum_of_weights += weight_of(c);
  }

  // What lasts from forward to backward.
  void lay_out(Arena& arena) {
    target_logits = arena.take<A>(p.rows);
    kept_shifts = arena.take<uint8_t>(tiles * kept_rows);
    kept_odd = arena.take<uint8_t>(kept_rows);
  }

  ClassTile<T> tile_of(int64_t t) const {
    const int64_t first = t * width, classes = least(width, p.classes - first);
    ClassTile<T> tile{};
    tile.first = first, tile.classes = classes;
    tile.linear_weight = linear_weight + first * p.features;
    if (p.linear_bias) tile.linear_bias = static_cast<const T*>(p.linear_bias) + first;
    if (p.weight) tile.weight = static_cast<const A*>(p.weight) + first;
    tile.softcap = A(p.options.softcap);
    if (kept_rows)
      tile.kept = {static_cast<T*>(p.dlinear_weight) + first * p.features,
                   kept_shifts + t * kept_rows, kept_odd, least(kept_rows, kept_rows_of(classes)),
                   classes};
    return tile;
  }
  // The weight of tile t, where there is one.
  Ahead weight_ahead(int64_t t) const {
    if (t >= tiles) return {};
    const ClassTile<T> tile = tile_of(t);
    return {tile.linear_weight, tile.classes * p.features * int64_t(sizeof(T))};
  }

  bool smooths() const { return p.options.label_smoothing != 0; }
  bool plain() const { return !smooths() && p.options.softcap == 0; }
  double weight_of(int64_t target) const {
    return p.weight ? double(static_cast<const A*>(p.weight)[target]) : 1.0;
  }

  // The memory of a thread that makes logits.
  struct Memory {
    S* weight = nullptr;          // the tile's, in panels of classes
    unit_t<T>* packed = nullptr;  // rows of x
    A* block = nullptr;           // (kFewRows, width)

    Memory() = default;
    Memory(const TiledLogits& of, Arena& arena) {
      const int64_t units = units_of<T>(of.of_features.depth), features = of.p.features;
      weight = arena.take<S>(of.of_features.count * units * of.width);
      packed = arena.take<unit_t<T>>(packed_units<T>(units, rows_are_units<T>(features, features)));
      block = arena.take<A>(kFewRows * of.width);
    }
  };
  void pack_weight(const ClassTile<T>& tile, const Memory& memory) const {
    const Source<T> weight{tile.linear_weight, p.features, 1, tile.classes};
    of_features.each(p.features, [&](int64_t slab, int64_t from, int64_t to) {
      pack_panels<T>(weight, 0, tile.classes, from, to, weight_slab(slab, memory));
    });
  }
  // memory.block = those of some rows, with the weight that was packed.
  void make(const ClassTile<T>& tile, int64_t first, int64_t rows, const Memory& memory,
            const Ahead& ahead) const {
    const Source<T> a{x + first * p.features, p.features, 1, rows};
    of_features.each(p.features, [&](int64_t slab, int64_t from, int64_t to) {
      const auto product = slab ? multiply<T, true, true, A> : multiply<T, true, false, A>;
      product(a, rows, from, to, weight_slab(slab, memory), tile.classes, memory.block, width,
              memory.packed, slab ? Ahead{} : ahead);
    });
    for (int64_t r = 0; tile.linear_bias && r < rows; ++r) {
      A* logits = memory.block + r * width;
      sweep<A>(tile.classes, [&](int64_t c, auto span) __attribute__((always_inline)) {
        store(logits + c, load(logits + c, span) + load(tile.linear_bias + c, span), span);
      });
    }
  }

 private:
  uint8_t* kept_shifts;  // of every tile
  uint8_t* kept_odd;     // of the last

  static int64_t width_of(const LinearCrossEntropy& p) {
    const int64_t fit = kTileBytes<T> / most(1, p.features * int64_t(sizeof(T)));
    // At least 128 Units, along which input's gradient is multiplied; at most a sixteenth of all.
    const int64_t wanted = least(most(fit, 128 * Kind<T>::kElements), 512);
    return most(64, least(wanted, p.classes / 16) / 32 * 32);
  }
  int64_t kept_rows_of(int64_t classes) const {
    // What is kept has the softcap's derivative in it; with smoothing that would be needed alone.
    if (!p.forward || !p.dlinear_weight || (smooths() && p.options.softcap > 0)) return 0;
    return least(p.rows, rows_that_fit<T>(classes * p.features * int64_t(sizeof(T)), classes));
  }
  S* weight_slab(int64_t slab, const Memory& memory) const {
    return memory.weight + slab * units_of<T>(of_features.depth) * width;
  }
};

}  // namespace fastlm::cpu::FASTLM_ISA
