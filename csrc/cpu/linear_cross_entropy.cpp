// linear_cross_entropy in two sweeps over tiles of classes, so that no more logits are held than a
// tile's: forward adds each tile to every row's log-sum-exp; backward turns a tile's logits into
// their gradient and multiplies that with the weight, into input's gradient, and with input, into
// the tile's part of the weight's. Where both are in one call and the weight gets a gradient, the
// logits' exponentials wait for backward in the memory of that (kept_exponentials.h), of as many
// rows as it has room for; the logits of other rows are made again.
//
// In forward a thread takes some tiles at a time. In backward all go from tile to tile, and a
// thread takes some of its rows, then some of its classes: what one writes and another reads is
// only the logits' gradient. Each packs the weight for itself, as reading what another core has
// just written takes longer. No sum depends on how many threads there are.
#include "arena.h"
#include "for_dtype.h"
#include "parallel.h"
#include "tiled_logits.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

constexpr int64_t kMostGroups = 128;  // of two tiles or more, each for one thread in forward

// The first sweep, over all rows of a tile at a time.
template <class T> class Forward {
  using A = acc_t<T>;
  using Logits = TiledLogits<T>;
  struct Memory {  // of a thread
    typename Logits::Memory logits;
    uint16_t* codes;  // of a kept row

    Memory(const Logits& of, Arena& arena)
        : logits(of, arena), codes(arena.take<uint16_t>(of.width)) {}
  };

  const Logits& logits;
  const LinearCrossEntropy& p = logits.p;
  const int64_t groups, bytes;  // bytes: of a Memory
  char* memories;
  A *bases, *totals;  // (groups, rows): lse = base + log(total)
  A* kept_bases;      // (tiles, kept rows)
  double* weighted;   // (groups, rows), with label smoothing

 public:
  Forward(const Logits& logits, Arena& arena)
      : logits(logits),
        groups(least(ceil_div(logits.tiles, 2), kMostGroups)),
        bytes(bytes_of<Memory>(logits)) {
    memories = arena.take<char>(logits.threads * bytes);
    bases = arena.take<A>(groups * p.rows);
    totals = arena.take<A>(groups * p.rows);
    weighted = arena.take<double>(logits.smooths() ? groups * p.rows : 0);
    kept_bases = arena.take<A>(logits.tiles * logits.kept_rows);
  }

  void run() const {
    int64_t next = 0;
    parallel_team(logits.threads, [&](int64_t me, int64_t) {
      Arena mine{memories + me * bytes};
      const Memory memory(logits, mine);
      for (;;) {
        const int64_t group = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (group >= groups) return;
        const int64_t first = logits.tiles * group / groups,
                      last = logits.tiles * (group + 1) / groups;
        for (int64_t t = first; t < last; ++t) {
          const int64_t then = __atomic_load_n(&next, __ATOMIC_RELAXED);
          add_tile(t, t + 1 < last ? t + 1 : logits.tiles * then / groups, group, t == first,
                   memory);
        }
      }
    });
    finish_losses();
  }

 private:
  // then: the tile that is asked for meanwhile.
  void add_tile(int64_t t, int64_t then, int64_t group, bool first_of_group,
                const Memory& memory) const {
    const ClassTile<T> tile = logits.tile_of(t);
    const Ahead ahead = logits.weight_ahead(then);
    const auto add = logits.plain() ? forward_row<T, true> : forward_row<T, false>;
    logits.pack_weight(tile, memory.logits);
    for (int64_t i = 0; i < logits.row_blocks; ++i) {
      const int64_t first = i * Logits::kFewRows, rows = least(Logits::kFewRows, p.rows - first);
      logits.make(tile, first, rows, memory.logits, ahead.part(i, logits.row_blocks));
      for (int64_t r = first; r < first + rows; ++r) {
        const int64_t at = group * p.rows + r;
        RunningSums<A> sums{-A(INFINITY), 0, 0};
        if (!first_of_group) sums = {bases[at], totals[at], logits.smooths() ? weighted[at] : 0};
        add(tile, r, memory.logits.block + (r - first) * logits.width, p.target[r],
            logits.smooths(), sums, logits.target_logits[r], memory.codes);
        bases[at] = sums.base, totals[at] = sums.total;
        if (r < tile.kept.rows) kept_bases[t * logits.kept_rows + r] = A(::ceil(double(sums.base)));
        if (logits.smooths()) weighted[at] = sums.weighted;
      }
    }
  }
  // From the sums of the groups, in their order.
  void finish_losses() const {
    parallel_for(p.rows, groups * 16, logits.threads, [&](int64_t first, int64_t last) {
      sweep<A>(last - first, [&](int64_t i, auto span) __attribute__((always_inline)) {
        const int64_t at = first + i;
        Vec<A> base = all(-A(INFINITY)), total = {};
        for (int64_t g = 0; g < groups; ++g) base = max(base, load(bases + g * p.rows + at, span));
        for (int64_t g = 0; g < groups; ++g) {
          const Vec<A> distance = load(bases + g * p.rows + at, span) - base;
          const Vec<A> of_group = load(totals + g * p.rows + at, span);
          // Of a group without any probability the distance may be NaN.
          total += of_group == 0 ? of_group : of_group * exp2_bounded(distance * A(kLog2e));
        }
        for (int64_t lane = 0; lane < live_lanes<A>(span); ++lane)
          finish_loss(at + lane, double(base[lane]), double(total[lane]));
      });
    });
  }
  void finish_loss(int64_t r, double base, double total) const {
    const double lse = base + ::log(total), smoothing = p.options.label_smoothing;
    double loss = 0;
    if (p.target[r] != p.options.ignore_index)
      loss = (1 - smoothing) * logits.weight_of(p.target[r]) *
                 (lse - double(logits.target_logits[r])) +
             p.options.lse_square_scale * lse * lse;
    if (p.target[r] != p.options.ignore_index && logits.smooths()) {
      double sum = 0;
      for (int64_t g = 0; g < groups; ++g) sum += weighted[g * p.rows + r];
      loss += smoothing / double(p.classes) * (logits.sum_of_weights * lse - sum);
    }
    p.lse[r] = lse;
    static_cast<A*>(p.loss)[r] = A(loss);
    for (int64_t t = 0; t < logits.tiles; ++t) {
      const KeptExponentials kept = logits.tile_of(t).kept;
      if (r < kept.rows)
        kept.shifts[r] = shift_of(double(kept_bases[t * logits.kept_rows + r]), lse);
    }
  }
};

// The second sweep: a tile's rows, then its classes.
template <class T> class Backward {
  using A = acc_t<T>;
  using U = unit_t<T>;
  using S = stored_t<T>;
  using Logits = TiledLogits<T>;
  static constexpr bool kNarrow = sizeof(T) < sizeof(A);
  static constexpr int64_t kHeight = kTileRows<A>, kPanel = kTileCols<T>, kBlock = kRows<A>;

  struct RowsMemory {  // of a thread, while it works on rows
    S* weight;         // the tile's, in panels of features
    U* packed;         // rows of the logits' gradient
    uint16_t* codes;   // of a kept row
    typename Logits::Memory logits;

    RowsMemory(const Backward& of, Arena& arena) {
      const int64_t width = of.logits.width, last_width = of.logits.last_width;
      weight = arena.take<S>(of.p.dx ? units_of<T>(width) * of.padded_features : 0);
      packed = arena.take<U>(most(of.packed_for(width), of.packed_for(last_width)));
      codes = arena.take<uint16_t>(width);
      if (of.logits.again) logits = {of.logits, arena};
    }
  };
  struct ClassesMemory {  // and then, while it works on classes
    U* packed;            // their rows of the logits' gradient, transposed
    A* sums;              // of the weight's gradient, where it is in another type

    ClassesMemory(const Backward& of, Arena& arena) {
      packed = arena.take<U>(packed_units<T>(units_of<T>(of.of_rows.depth), false));
      sums = arena.take<A>(kNarrow && of.of_rows.count > 1 ? kBlock * of.p.features : 0);
    }
  };

  const Logits& logits;
  const LinearCrossEntropy& p = logits.p;
  const Slabs of_rows;
  const int64_t padded_features, panels, bytes;  // bytes: of either memory
  char* memories;
  RowScales<A>* row_scales;
  T* dlogits;   // (rows, width)
  A* dx;        // or its sums
  S* x_panels;  // slab by slab

 public:
  Backward(const Logits& logits, Arena& arena)
      : logits(logits),
        of_rows(Slabs::of<T>(p.rows)),
        padded_features(ceil_div(p.features, kPanel) * kPanel),
        panels(padded_features / kPanel),
        bytes(most(bytes_of<RowsMemory>(*this), bytes_of<ClassesMemory>(*this))) {
    row_scales = arena.take<RowScales<A>>(p.rows);
    dlogits = arena.take<T>(p.rows * logits.width);
    memories = arena.take<char>(logits.threads * bytes);
    dx = kNarrow && p.dx ? arena.take<A>(p.rows * p.features) : static_cast<A*>(p.dx);
    x_panels = arena.take<S>(
        p.dlinear_weight ? of_rows.count * units_of<T>(of_rows.depth) * padded_features : 0);
  }

  void run() const {
    scale_rows();
    Shares of_blocks(logits.threads), of_pieces(logits.threads);
    parallel_team(logits.threads, [&](int64_t me, int64_t team) {
      Arena mine{memories + me * bytes}, mine_after = mine;
      const RowsMemory memory(*this, mine);
      const ClassesMemory memory_after(*this, mine_after);
      if (p.dlinear_weight) pack_x(me, team);
      of_blocks.begin(logits.row_blocks, me, team);
      for (int64_t t = 0; t < logits.tiles; ++t) {
        const ClassTile<T> tile = logits.tile_of(t);
        const Pieces pieces = pieces_of(tile, team);
        wait_for(team);
        of_pieces.begin(pieces.down * pieces.across, me, team);
        if (logits.again) logits.pack_weight(tile, memory.logits);
        if (p.dx)
          pack_panels<T>(Source<T>{tile.linear_weight, 1, p.features, p.features}, 0, p.features, 0,
                         tile.classes, memory.weight);
        of_blocks.take(me, team, [&](int64_t i) { rows_of_tile(t, tile, i, memory); });
        wait_for(team);
        of_blocks.begin(logits.row_blocks, me, team);
        const Ahead ahead = logits.weight_ahead(t + 1);
        const int64_t each = most(1, pieces.down * pieces.across / team);
        of_pieces.take(me, team, [&](int64_t i) {
          classes_of_tile(tile, pieces, i, memory_after, ahead.part(i % each, each));
        });
      }
      wait_for(team);
      if (!kNarrow || !p.dx) return;
      const int64_t first = p.rows * me / team, last = p.rows * (me + 1) / team;
      round_row(dx + first * p.features, static_cast<T*>(p.dx) + first * p.features,
                (last - first) * p.features);
    });
  }

 private:
  int64_t packed_for(int64_t classes) const {
    return packed_units<T>(units_of<T>(classes), rows_are_units<T>(logits.width, classes));
  }
  void scale_rows() const {
    const double smoothing = p.options.label_smoothing;
    for (int64_t r = 0; r < p.rows; ++r) {
      row_scales[r] = {};
      if (p.target[r] == p.options.ignore_index) continue;
      const double dloss = double(static_cast<const A*>(p.dloss)[r]);
      const double hard = (1 - smoothing) * logits.weight_of(p.target[r]) * dloss;
      const double smooth = smoothing / double(p.classes) * dloss;
      const double square = 2 * p.options.lse_square_scale * p.lse[r] * dloss;
      row_scales[r] = {A(hard + smooth * logits.sum_of_weights + square), A(smooth), A(hard)};
    }
  }

  void pack_x(int64_t me, int64_t team) const {
    const Source<T> source{static_cast<const T*>(p.x), 1, p.features, p.features};
    const int64_t first = panels * me / team * kPanel;
    const int64_t last = least(p.features, panels * (me + 1) / team * kPanel);
    of_rows.each(p.rows, [&](int64_t slab, int64_t from, int64_t to) {
      pack_panels<T>(source, first, last, from, to, x_slab(slab) + first * units_of<T>(to - from));
    });
  }
  S* x_slab(int64_t i) const { return x_panels + i * units_of<T>(of_rows.depth) * padded_features; }

  // The gradient of the logits of a block of rows, and what it adds to input's.
  void rows_of_tile(int64_t t, const ClassTile<T>& tile, int64_t i,
                    const RowsMemory& memory) const {
    const int64_t first = i * Logits::kFewRows, rows = least(Logits::kFewRows, p.rows - first);
    if (first + rows > tile.kept.rows) logits.make(tile, first, rows, memory.logits, {});
    const auto gradient = logits.plain() ? backward_row<T, true> : backward_row<T, false>;
    for (int64_t r = first; r < first + rows; ++r)
      gradient(tile, r, memory.logits.block + (r - first) * logits.width, p.target[r],
               logits.target_logits[r], p.lse[r], row_scales[r], dlogits + r * logits.width,
               memory.codes);
    if (!p.dx) return;
    const Source<T> a{dlogits + first * logits.width, logits.width, 1, rows};
    const auto product = t ? multiply<T, true, true, A> : multiply<T, true, false, A>;
    product(a, rows, 0, tile.classes, memory.weight, p.features, dx + first * p.features,
            p.features, memory.packed, {});
  }

  // How the weight's gradient of a tile is cut up: register tiles down, panels across.
  struct Pieces {
    int64_t tiles, down, across;
  };
  Pieces pieces_of(const ClassTile<T>& tile, int64_t team) const {
    if (!p.dlinear_weight && !p.dlinear_bias) return {0, 0, 0};
    // As many for each thread, unless they become so low that input is read too often.
    const int64_t tiles = ceil_div(tile.classes, kHeight), blocks = ceil_div(tile.classes, kBlock);
    const int64_t down = most(blocks, least(ceil_div(blocks, team) * team, tiles / 4));
    return {tiles, down, most(1, least(panels, ceil_div(team, down)))};
  }
  // A piece of the gradients of the tile's weight and bias.
  void classes_of_tile(const ClassTile<T>& tile, const Pieces& pieces, int64_t i,
                       const ClassesMemory& memory, const Ahead& ahead) const {
    const int64_t row = i / pieces.across, col = i % pieces.across;
    const int64_t first = pieces.tiles * row / pieces.down * kHeight;
    const int64_t last = least(tile.classes, pieces.tiles * (row + 1) / pieces.down * kHeight);
    const int64_t from_col = panels * col / pieces.across * kPanel;
    const int64_t to_col = least(p.features, panels * (col + 1) / pieces.across * kPanel);
    if (p.dlinear_bias && col == 0) sum_rows(tile, first, last);
    if (!p.dlinear_weight) return;
    T* out = static_cast<T*>(p.dlinear_weight) + (tile.first + first) * p.features + from_col;
    const Source<T> a{dlogits + first, 1, logits.width, logits.width - first};
    if (of_rows.count == 1) {
      multiply<T, false, false>(a, last - first, 0, p.rows,
                                x_panels + from_col * units_of<T>(p.rows), to_col - from_col, out,
                                p.features, memory.packed, ahead);
      return;
    }
    A* sums = kNarrow ? memory.sums : reinterpret_cast<A*>(out);
    of_rows.each(p.rows, [&](int64_t slab, int64_t from, int64_t to) {
      const auto product = slab ? multiply<T, false, true, A> : multiply<T, false, false, A>;
      product(a, last - first, from, to, x_slab(slab) + from_col * units_of<T>(to - from),
              to_col - from_col, sums, p.features, memory.packed, slab ? Ahead{} : ahead);
    });
    for (int64_t r = 0; kNarrow && r < last - first; ++r)
      round_row(sums + r * p.features, out + r * p.features, to_col - from_col);
  }
  static void round_row(const A* sums, T* out, int64_t n) {
    sweep<A>(n, [&](int64_t i, auto span)
                    __attribute__((always_inline)) { store(out + i, load(sums + i, span), span); });
  }
  // The bias' gradient of classes [first, last): sums of sums of some rows, which round less.
  void sum_rows(const ClassTile<T>& tile, int64_t first, int64_t last) const {
    T* out = static_cast<T*>(p.dlinear_bias) + tile.first;
    sweep<A>(last - first, [&](int64_t i, auto span) __attribute__((always_inline)) {
      Vec<A> total = {};
      for (int64_t block = 0; block < p.rows; block += kBlock) {
        Vec<A> some = {};
        for (int64_t r = block; r < least(p.rows, block + kBlock); ++r)
          some += load(dlogits + r * logits.width + first + i, span);
        total += some;
      }
      store(out + first + i, total, span);
    });
  }
};

template <class T> void run(const LinearCrossEntropy& p, int64_t threads) {
  TiledLogits<T> logits(p, threads);
  // bfloat16's gradient of input is written last: until then its memory is for other things.
  const bool has_spare = sizeof(T) < sizeof(acc_t<T>) && p.dx;
  const int64_t spare_bytes = has_spare ? p.rows * p.features * int64_t(sizeof(T)) : 0;
  Arena counted{nullptr, nullptr, spare_bytes};
  logits.lay_out(counted);
  Arena counted_forward = counted;
  if (p.forward) Forward<T>(logits, counted_forward);
  if (p.backward) Backward<T>(logits, counted);

  const Scratch<char> memory(most(counted.used, counted_forward.used));
  Arena arena{memory.data(), static_cast<char*>(p.dx), spare_bytes};
  logits.lay_out(arena);
  Arena arena_forward = arena;
  if (p.forward) Forward<T>(logits, arena_forward).run();
  if (p.backward) Backward<T>(logits, arena).run();
}

}  // namespace

void launch(const LinearCrossEntropy& p, int64_t threads) {
  for_dtype(p.dtype, false, [&](auto element, auto) { run<decltype(element)>(p, threads); });
}

}  // namespace fastlm::cpu::FASTLM_ISA
