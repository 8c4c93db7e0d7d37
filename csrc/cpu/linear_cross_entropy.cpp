// linear_cross_entropy in two sweeps over tiles of classes, so that no more logits are held than a
// tile's: forward adds each tile to every row's log-sum-exp; backward turns a tile's logits into
// their gradient and multiplies that with the weight, into input's gradient, and with input, into
// the tile's part of the weight's. Where both are in one call and the weight gets a gradient, the
// logits wait for backward in the memory of that (kept_logits.h), of as many rows as it has room
// for; those of other rows are made again.
//
// In forward a thread takes some tiles at a time. In backward all go from tile to tile, and a
// thread takes some of its rows, then some of its classes: what one writes and another reads is
// only the logits' gradient. Each packs the weight for itself, as reading what another core has
// just written takes longer. No sum depends on how many threads there are.
#include "../linear_cross_entropy.h"

#include "cross_entropy_rows.h"
#include "for_dtype.h"
#include "parallel.h"
#include "product_panels.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

// Of a tile's weight: packed, it stays in an L2 cache. And at N = 1024, C = 768 all that backward
// holds for bfloat16 on two threads fits in input's gradient, where the first operands are not
// Units (they are packed, in float32) too.
template <class T> constexpr int64_t kTileBytes = rows_are_units<T>(2, 2) ? 393216 : 344064;
constexpr int64_t kMostGroups = 128;  // of two tiles or more, each for one thread in forward

// Cuts memory into arrays: in `spare` while there is room, then in `rest`. Where these are null it
// counts how much they take.
struct Arena {
  char *spare, *rest;
  int64_t spare_bytes, spare_used = 0, used = 0;

  template <class X> X* take(int64_t count) {
    const int64_t bytes = ceil_div(count * int64_t(sizeof(X)), 64) * 64;
    const bool fits = spare_used + bytes <= spare_bytes;
    int64_t& at = fits ? spare_used : used;
    at += bytes;
    return reinterpret_cast<X*>(uintptr_t(fits ? spare : rest) + uintptr_t(at - bytes));
  }
};

template <class T> class Call {
  using A = acc_t<T>;
  using U = unit_t<T>;
  using S = stored_t<T>;
  using Tile = ClassTile<T>;
  static constexpr bool kNarrow = sizeof(T) < sizeof(A);
  static constexpr int64_t kHeight = kTileRows<A>, kPanel = kTileCols<T>, kBlock = kRows<A>;
  // Rows that are taken at a time: few, so that their logits are in the cache when the softmax
  // reads them, and another thread can take what one has not begun.
  static constexpr int64_t kFewRows = kBlock / 2;

  enum class Phase { forward, rows, classes };
  struct Mine {       // a thread's memory in a phase
    uint16_t* codes;  // of a kept row
    U* rows;          // packed, of a product's first operand
    S* across;        // the tile's weight in panels of classes, for the logits,
    S* along;         // and of features, for input's gradient
    A* block;         // logits of some rows, or the weight's gradient of some classes
  };

  const LinearCrossEntropy& p;
  const T *const x, *const linear_weight;
  T* const dlinear_weight;
  const int64_t threads, width, tiles, last_width, groups, row_blocks, padded_features;
  const Slabs of_features, of_rows;
  const int64_t kept_rows;  // of a whole tile: the last may have room for fewer
  const bool again;         // whether backward makes logits
  double sum_of_weights = p.weight ? 0.0 : double(p.classes);

  scale_t<T>* kept_scales;  // of every tile
  uint8_t* kept_odd;        // of the last
  A* target_logits;
  RowScales<A>* row_scales;
  A *bases, *totals;  // (groups, rows): lse = base + log(total)
  double* weighted;   // (groups, rows), with label smoothing
  T* dlogits;         // (rows, width)
  A* dx;              // or its sums
  S* x_panels;        // slab by slab
  char* working;      // Mine of each thread
  int64_t working_bytes;

 public:
  Call(const LinearCrossEntropy& p, int64_t threads)
      : p(p),
        x(static_cast<const T*>(p.x)),
        linear_weight(static_cast<const T*>(p.linear_weight)),
        dlinear_weight(static_cast<T*>(p.dlinear_weight)),
        threads(p.rows * p.features * p.classes < kWorthATeam ? 1 : threads),
        width(width_of(p)),
        tiles(ceil_div(p.classes, width)),
        last_width(p.classes - (tiles - 1) * width),
        groups(least(ceil_div(tiles, 2), kMostGroups)),
        row_blocks(ceil_div(p.rows, kFewRows)),
        padded_features(ceil_div(p.features, kPanel) * kPanel),
        of_features(Slabs::of<T>(p.features)),
        of_rows(Slabs::of<T>(p.rows)),
        kept_rows(kept_rows_of(width)),
        again(kept_rows < p.rows || kept_rows_of(last_width) < p.rows) {
    for (int64_t c = 0; p.weight && c < p.classes; ++c) sum_of_weights += weight_of(c);
  }

  void run() {
    // bfloat16's gradient of input is written last: until then its memory is for other things.
    const int64_t spare = kNarrow && p.dx ? p.rows * p.features * int64_t(sizeof(T)) : 0;
    Arena counted{nullptr, nullptr, spare};
    lay_out(counted);
    Arena counted_forward = counted;
    if (p.forward) lay_out_forward(counted_forward);
    if (p.backward) lay_out_backward(counted);
    const Scratch<char> memory(most(counted.used, counted_forward.used));

    Arena arena{static_cast<char*>(p.dx), memory.data(), spare};
    lay_out(arena);
    if (p.forward) {
      Arena arena_forward = arena;
      lay_out_forward(arena_forward);
      forward();
    }
    if (p.backward) {
      lay_out_backward(arena);
      backward();
    }
  }

 private:
  static int64_t width_of(const LinearCrossEntropy& p) {
    const int64_t fit = kTileBytes<T> / most(1, p.features * int64_t(sizeof(T)));
    // At least 128 Units, along which input's gradient is multiplied; at most a sixteenth of all.
    const int64_t wanted = least(most(fit, 128 * Kind<T>::kElements), 512);
    return most(64, least(wanted, p.classes / 16) / 32 * 32);
  }
  int64_t kept_rows_of(int64_t classes) const {
    const bool room = p.forward && p.dlinear_weight && p.features > 0;
    return room
               ? least(p.rows, rows_that_fit<T>(classes * p.features * int64_t(sizeof(T)), classes))
               : 0;
  }
  Tile tile_of(int64_t t) const {
    const int64_t first = t * width, classes = least(width, p.classes - first);
    Tile tile{first,   classes, linear_weight + first * p.features,
              nullptr, nullptr, A(p.options.softcap),
              {}};
    if (p.linear_bias) tile.linear_bias = static_cast<const T*>(p.linear_bias) + first;
    if (p.weight) tile.weight = static_cast<const A*>(p.weight) + first;
    if (kept_rows)
      tile.kept = {dlinear_weight + first * p.features, kept_scales + t * kept_rows, kept_odd,
                   least(kept_rows, kept_rows_of(classes)), classes};
    return tile;
  }

  bool smooths() const { return p.options.label_smoothing != 0; }
  bool plain() const { return !smooths() && p.options.softcap == 0; }

  // ---- memory ----

  void lay_out(Arena& arena) {
    kept_scales = arena.take<scale_t<T>>(tiles * kept_rows);
    kept_odd = arena.take<uint8_t>(kept_rows);
    target_logits = arena.take<A>(p.rows);
    row_scales = arena.take<RowScales<A>>(p.rows);
  }
  void lay_out_forward(Arena& arena) {
    working_bytes = lay_out_mine(Phase::forward, nullptr).bytes;
    working = arena.take<char>(threads * working_bytes);
    bases = arena.take<A>(groups * p.rows);
    totals = arena.take<A>(groups * p.rows);
    weighted = arena.take<double>(smooths() ? groups * p.rows : 0);
  }
  void lay_out_backward(Arena& arena) {
    dlogits = arena.take<T>(p.rows * width);
    working_bytes =
        most(lay_out_mine(Phase::rows, nullptr).bytes, lay_out_mine(Phase::classes, nullptr).bytes);
    working = arena.take<char>(threads * working_bytes);
    dx = kNarrow && p.dx ? arena.take<A>(p.rows * p.features) : static_cast<A*>(p.dx);
    x_panels = arena.take<S>(
        p.dlinear_weight ? of_rows.count * units_of<T>(of_rows.depth) * padded_features : 0);
  }
  // Of a thread, from `at` on, and how many bytes it takes.
  struct Laid {
    Mine mine;
    int64_t bytes;
  };
  Laid lay_out_mine(Phase phase, char* at) const {
    Mine mine{};
    Arena arena{nullptr, at, 0};
    const bool logits = phase == Phase::forward || (phase == Phase::rows && again);
    int64_t rows = 0;
    if (logits) {
      rows = packed_units<T>(units_of<T>(of_features.depth),
                             rows_are_units<T>(p.features, p.features));
      mine.across = arena.take<S>(of_features.count * units_of<T>(of_features.depth) * width);
      mine.block = arena.take<A>(kFewRows * width);
    }
    if (phase == Phase::rows && p.dx) {
      rows = most(rows, most(rows_for_dx(width), rows_for_dx(last_width)));
      mine.along = arena.take<S>(units_of<T>(width) * padded_features);
    }
    if (phase == Phase::classes) {
      rows = packed_units<T>(units_of<T>(of_rows.depth), false);
      mine.block = arena.take<A>(kNarrow && of_rows.count > 1 ? kBlock * p.features : 0);
    }
    mine.rows = arena.take<U>(rows);
    mine.codes = arena.take<uint16_t>(width);
    return {mine, arena.used};
  }
  int64_t rows_for_dx(int64_t classes) const {
    return packed_units<T>(units_of<T>(classes), rows_are_units<T>(width, classes));
  }
  Mine mine_of(Phase phase, int64_t me) const {
    return lay_out_mine(phase, working + me * working_bytes).mine;
  }

  // ---- logits ----

  // The panels of a tile's weight whose columns are classes.
  void pack_across_of(const Tile& tile, S* out) const {
    const Source<T> weight{tile.linear_weight, p.features, 1, tile.classes};
    for (int64_t from = 0; from < p.features; from += of_features.depth) {
      const int64_t to = least(p.features, from + of_features.depth);
      pack_panels<T>(weight, 0, tile.classes, from, to, out);
      out += units_of<T>(of_features.depth) * width;
    }
  }
  // mine.block (rows, width) = those of some rows.
  void make_logits(const Tile& tile, int64_t first, int64_t rows, const Mine& mine,
                   const Ahead& ahead) const {
    const Source<T> a{x + first * p.features, p.features, 1, rows};
    const S* b = mine.across;
    int64_t from = 0;
    do {  // once without features: zeros
      const int64_t to = least(p.features, from + of_features.depth);
      const auto product = from ? multiply<T, true, true, A> : multiply<T, true, false, A>;
      product(a, rows, from, to, b, tile.classes, mine.block, width, mine.rows,
              from ? Ahead{} : ahead);
      b += units_of<T>(of_features.depth) * width;
      from = to;
    } while (from < p.features);
    for (int64_t r = 0; tile.linear_bias && r < rows; ++r) {
      A* logits = mine.block + r * width;
      sweep<A>(tile.classes, [&](int64_t c, auto span) __attribute__((always_inline)) {
        store(logits + c, load(logits + c, span) + load(tile.linear_bias + c, span), span);
      });
    }
  }
  Ahead weight_ahead(int64_t t) const {
    if (t >= tiles) return {};
    const Tile tile = tile_of(t);
    return {tile.linear_weight, tile.classes * p.features * int64_t(sizeof(T))};
  }

  // ---- forward ----

  void forward() {
    int64_t next = 0;
    parallel_team(threads, [&](int64_t me, int64_t) {
      const Mine mine = mine_of(Phase::forward, me);
      for (;;) {
        const int64_t group = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (group >= groups) return;
        const int64_t first = tiles * group / groups, last = tiles * (group + 1) / groups;
        for (int64_t t = first; t < last; ++t) {
          const int64_t then = __atomic_load_n(&next, __ATOMIC_RELAXED);
          forward_tile(t, t + 1 < last ? t + 1 : tiles * then / groups, group, t == first, mine);
        }
      }
    });
    finish_losses();
  }
  // then: the tile that is asked for meanwhile.
  void forward_tile(int64_t t, int64_t then, int64_t group, bool first_of_group,
                    const Mine& mine) const {
    const Tile tile = tile_of(t);
    const Ahead ahead = weight_ahead(then);
    const auto add = plain() ? forward_row<T, true> : forward_row<T, false>;
    pack_across_of(tile, mine.across);
    for (int64_t i = 0; i < row_blocks; ++i) {
      const int64_t first = i * kFewRows, rows = least(kFewRows, p.rows - first);
      make_logits(tile, first, rows, mine, ahead.part(i, row_blocks));
      for (int64_t r = first; r < first + rows; ++r) {
        const int64_t at = group * p.rows + r;
        RunningSums<A> sums{-A(INFINITY), 0, 0};
        if (!first_of_group) sums = {bases[at], totals[at], smooths() ? weighted[at] : 0};
        add(tile, r, mine.block + (r - first) * width, p.target[r], smooths(), sums,
            target_logits[r], mine.codes);
        bases[at] = sums.base, totals[at] = sums.total;
        if (smooths()) weighted[at] = sums.weighted;
      }
    }
  }
  // From the sums of the groups, in their order.
  void finish_losses() const {
    parallel_for(p.rows, groups * 16, threads, [&](int64_t first, int64_t last) {
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
      loss = (1 - smoothing) * weight_of(p.target[r]) * (lse - double(target_logits[r])) +
             p.options.lse_square_scale * lse * lse;
    if (p.target[r] != p.options.ignore_index && smooths()) {
      double sum = 0;
      for (int64_t g = 0; g < groups; ++g) sum += weighted[g * p.rows + r];
      loss += smoothing / double(p.classes) * (sum_of_weights * lse - sum);
    }
    p.lse[r] = lse;
    static_cast<A*>(p.loss)[r] = A(loss);
  }
  double weight_of(int64_t target) const {
    return p.weight ? double(static_cast<const A*>(p.weight)[target]) : 1.0;
  }

  // ---- backward ----

  void scale_rows() {
    const double smoothing = p.options.label_smoothing;
    for (int64_t r = 0; r < p.rows; ++r) {
      row_scales[r] = {};
      if (p.target[r] == p.options.ignore_index) continue;
      const double dloss = double(static_cast<const A*>(p.dloss)[r]);
      const double hard = (1 - smoothing) * weight_of(p.target[r]) * dloss;
      const double smooth = smoothing / double(p.classes) * dloss;
      const double square = 2 * p.options.lse_square_scale * p.lse[r] * dloss;
      row_scales[r] = {A(hard + smooth * sum_of_weights + square), A(smooth), A(hard)};
    }
  }

  void backward() {
    scale_rows();
    Shares of_blocks(threads), of_pieces(threads);
    parallel_team(threads, [&](int64_t me, int64_t team) {
      const Mine mine = mine_of(Phase::rows, me), mine_after = mine_of(Phase::classes, me);
      if (p.dlinear_weight) pack_x(me, team);
      of_blocks.begin(row_blocks, me, team);
      for (int64_t t = 0; t < tiles; ++t) {
        const Tile tile = tile_of(t);
        const Pieces pieces = pieces_of(tile, team);
        wait_for(team);
        of_pieces.begin(pieces.down * pieces.across, me, team);
        if (again) pack_across_of(tile, mine.across);
        if (p.dx)
          pack_panels<T>(Source<T>{tile.linear_weight, 1, p.features, p.features}, 0, p.features, 0,
                         tile.classes, mine.along);
        of_blocks.take(me, team, [&](int64_t i) { backward_rows(t, tile, i, mine); });
        wait_for(team);
        of_blocks.begin(row_blocks, me, team);
        const Ahead ahead = weight_ahead(t + 1);
        const int64_t each = most(1, pieces.down * pieces.across / team);
        of_pieces.take(me, team, [&](int64_t i) {
          backward_classes(tile, pieces, i, mine_after, ahead.part(i % each, each));
        });
      }
      wait_for(team);
      if (!kNarrow || !p.dx) return;
      const int64_t first = p.rows * me / team, last = p.rows * (me + 1) / team;
      round_row(dx + first * p.features, static_cast<T*>(p.dx) + first * p.features,
                (last - first) * p.features);
    });
  }

  void pack_x(int64_t me, int64_t team) const {
    const Source<T> source{x, 1, p.features, p.features};
    const int64_t panels = padded_features / kPanel;
    const int64_t first = panels * me / team * kPanel;
    const int64_t last = least(p.features, panels * (me + 1) / team * kPanel);
    for (int64_t from = 0, slab = 0; from < p.rows; from += of_rows.depth, ++slab) {
      const int64_t to = least(p.rows, from + of_rows.depth);
      pack_panels<T>(source, first, last, from, to, x_slab(slab) + first * units_of<T>(to - from));
    }
  }
  S* x_slab(int64_t i) const { return x_panels + i * units_of<T>(of_rows.depth) * padded_features; }

  // The gradient of the logits of a block of rows, and what it adds to input's.
  void backward_rows(int64_t t, const Tile& tile, int64_t i, const Mine& mine) const {
    const int64_t first = i * kFewRows, rows = least(kFewRows, p.rows - first);
    if (first + rows > tile.kept.rows) make_logits(tile, first, rows, mine, {});
    const auto gradient = plain() ? backward_row<T, true> : backward_row<T, false>;
    for (int64_t r = first; r < first + rows; ++r)
      gradient(tile, r, mine.block + (r - first) * width, p.target[r], p.lse[r], row_scales[r],
               dlogits + r * width, mine.codes);
    if (!p.dx) return;
    const Source<T> a{dlogits + first * width, width, 1, rows};
    const auto product = t ? multiply<T, true, true, A> : multiply<T, true, false, A>;
    product(a, rows, 0, tile.classes, mine.along, p.features, dx + first * p.features, p.features,
            mine.rows, {});
  }

  // How the weight's gradient of a tile is cut up: register tiles down, panels across.
  struct Pieces {
    int64_t tiles, down, across;
  };
  Pieces pieces_of(const Tile& tile, int64_t team) const {
    if (!p.dlinear_weight && !p.dlinear_bias) return {0, 0, 0};
    // As many for each thread, unless they become so low that input is read too often.
    const int64_t tiles = ceil_div(tile.classes, kHeight), blocks = ceil_div(tile.classes, kBlock);
    const int64_t down = most(blocks, least(ceil_div(blocks, team) * team, tiles / 4));
    return {tiles, down, most(1, least(padded_features / kPanel, ceil_div(team, down)))};
  }
  // A piece of the gradients of the tile's weight and bias.
  void backward_classes(const Tile& tile, const Pieces& pieces, int64_t i, const Mine& mine,
                        const Ahead& ahead) const {
    const int64_t row = i / pieces.across, col = i % pieces.across;
    const int64_t panels = padded_features / kPanel;
    const int64_t first = pieces.tiles * row / pieces.down * kHeight;
    const int64_t last = least(tile.classes, pieces.tiles * (row + 1) / pieces.down * kHeight);
    const int64_t from_col = panels * col / pieces.across * kPanel;
    const int64_t to_col = least(p.features, panels * (col + 1) / pieces.across * kPanel);
    if (p.dlinear_bias && col == 0) sum_rows(tile, first, last);
    if (!p.dlinear_weight) return;
    T* out = dlinear_weight + (tile.first + first) * p.features + from_col;
    A* sums = kNarrow ? mine.block : reinterpret_cast<A*>(out);
    const Source<T> a{dlogits + first, 1, width, width - first};
    if (of_rows.count == 1) {
      multiply<T, false, false>(a, last - first, 0, p.rows,
                                x_panels + from_col * units_of<T>(p.rows), to_col - from_col, out,
                                p.features, mine.rows, ahead);
      return;
    }
    int64_t from = 0, slab = 0;
    do {  // once without rows: zeros
      const int64_t to = least(p.rows, from + of_rows.depth);
      const auto product = slab ? multiply<T, false, true, A> : multiply<T, false, false, A>;
      product(a, last - first, from, to, x_slab(slab) + from_col * units_of<T>(to - from),
              to_col - from_col, sums, p.features, mine.rows, slab ? Ahead{} : ahead);
      from = to, ++slab;
    } while (from < p.rows);
    for (int64_t r = 0; kNarrow && r < last - first; ++r)
      round_row(sums + r * p.features, out + r * p.features, to_col - from_col);
  }
  static void round_row(const A* sums, T* out, int64_t n) {
    sweep<A>(n, [&](int64_t i, auto span)
                    __attribute__((always_inline)) { store(out + i, load(sums + i, span), span); });
  }
  // The bias' gradient of classes [first, last): sums of sums of some rows, which round less.
  void sum_rows(const Tile& tile, int64_t first, int64_t last) const {
    T* out = static_cast<T*>(p.dlinear_bias) + tile.first;
    sweep<A>(last - first, [&](int64_t i, auto span) __attribute__((always_inline)) {
      Vec<A> total = {};
      for (int64_t block = 0; block < p.rows; block += kBlock) {
        Vec<A> some = {};
        for (int64_t r = block; r < least(p.rows, block + kBlock); ++r)
          some += load(dlogits + r * width + first + i, span);
        total += some;
      }
      store(out + first + i, total, span);
    });
  }
};

}  // namespace

void launch(const LinearCrossEntropy& p, int64_t threads) {
  for_dtype(p.dtype, false, [&](auto element, auto) { Call<decltype(element)>(p, threads).run(); });
}

}  // namespace fastlm::cpu::FASTLM_ISA
