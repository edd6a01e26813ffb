// What a decoder does for a token on a CPU: products of a few rows with large kernels, and attention of a few
// queries to a cache. Both are as fast as weights and keys can be read, so these loops read each of them
// once, in order, on all threads of XLA, and ask for what comes next before they need it.
//
// loops.py compiles this file and says what may be given to it; XLA calls it (jax.ffi).

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Matrix = ffi::Buffer<ffi::F32, 2>;
using Cube = ffi::Buffer<ffi::F32, 3>;
using Seen = ffi::Buffer<ffi::PRED, 3>;

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32, TOGETHER = 8;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8, REGISTERS = 16, TOGETHER = 4;
#else
#error "the processor has no AVX2"
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));  // the numbers of one register
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

constexpr int MOST = 16;          // rows of a product, as in loops.py
constexpr int64_t DEPTH = 32;     // rows of a kernel that are multiplied before the next columns are taken
constexpr int64_t ABREAST = 8;    // the same where there is one row to multiply by them
constexpr int64_t LENGTH = 8192;  // sums of several threads that one adds up
constexpr int64_t SOME = 48;      // outputs of a turned kernel that a thread takes at a time
constexpr int64_t KEYS = 64;      // keys that all queries of a head meet before the next are read
constexpr int64_t AHEAD = 12;     // keys between the one that is asked for and the one that is used

// Arrays begin anywhere, so registers are filled and emptied as bytes are copied; that is one instruction.
template <class Lanes = Vector>
Lanes load(const float* from) {
  Lanes a;
  std::memcpy(&a, from, sizeof a);
  return a;
}

template <class Lanes>
void store(float* to, Lanes a) {
  std::memcpy(to, &a, sizeof a);
}

// How many of a size cover all.
int64_t pieces(int64_t all, int64_t size) { return (all + size - 1) / size; }

bool same(ffi::Span<const int64_t> a, ffi::Span<const int64_t> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

// Runs task(0) ... task(count - 1), on the threads of XLA and on this one, until all are done. Whoever is
// first takes the next, so nothing waits for a thread that wakes late.
template <class Task>
void share(ffi::ThreadPool& pool, int64_t count, Task task) {
  struct Work {
    Task task;
    int64_t count;
    std::atomic<int64_t> next{0}, done{0};
    Work(Task task, int64_t count) : task(std::move(task)), count(count) {}
    void run() {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        task(i);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  auto work = std::make_shared<Work>(std::move(task), count);  // a thread may come when all is over
  for (int64_t i = std::min<int64_t>(pool.num_threads(), count); i > 1; i--)
    pool.Schedule([work] { work->run(); });
  work->run();
  for (int turn = 1; work->done.load(std::memory_order_acquire) < count; turn++) {
    _mm_pause();
    if (turn % 4096 == 0) std::this_thread::yield();  // perhaps that thread waits for this core
  }
}

// y [M, T * lanes] = x [depth, M], transposed, times w [depth, T * lanes]; added to y unless `first`. Rows of
// w and y are `stride` apart, those of x `rows`. `ahead` is what will be read next: w, further down. (One row
// of x lets the processor see that by itself, and to be told only delays it.)
template <int M, int T, class Lanes>
void tile(const float* x, const float* w, float* y, int64_t depth, int64_t stride, int64_t rows, bool first,
          const float* ahead) {
  constexpr int lanes = sizeof(Lanes) / sizeof(float);
  Lanes sums[M][T];
  for (int m = 0; m < M; m++)
    for (int t = 0; t < T; t++) sums[m][t] = first ? Lanes{} : load<Lanes>(y + m * stride + t * lanes);
  for (int64_t k = 0; k < depth; k++, x += rows, w += stride, ahead += stride) {
    Lanes part[T];
    for (int t = 0; t < T; t++) {
      if (M > 1) __builtin_prefetch(ahead + t * lanes, 0, 2);
      part[t] = load<Lanes>(w + t * lanes);
    }
    for (int m = 0; m < M; m++)
      for (int t = 0; t < T; t++) sums[m][t] += x[m] * part[t];
  }
  for (int m = 0; m < M; m++)
    for (int t = 0; t < T; t++) store(y + m * stride + t * lanes, sums[m][t]);
}

// Registers' worth of columns of a tile of M rows: sums, a row of w and a number of x stand in registers.
template <int M>
constexpr int wide = std::min(8, (REGISTERS - 1) / (M + 1));

// As `tile`, for any number of columns.
template <int M>
void block(const float* x, const float* w, float* y, int64_t depth, int64_t columns, int64_t stride,
           int64_t rows, bool first, int64_t further) {
  constexpr int64_t width = wide<M> * LANES;
  int64_t n = 0;
  for (; n + width <= columns; n += width)
    tile<M, wide<M>, Vector>(x, w + n, y + n, depth, stride, rows, first, w + n + further);
  for (; n + LANES <= columns; n += LANES)
    tile<M, 1, Vector>(x, w + n, y + n, depth, stride, rows, first, w + n + further);
  for (; n < columns; n++) tile<M, 1, float>(x, w + n, y + n, depth, stride, rows, first, w + n + further);
}

using Block = decltype(&block<1>);
constexpr Block BLOCKS[] = {block<1>, block<2>, block<3>, block<4>, block<5>, block<6>, block<7>, block<8>};
constexpr int64_t WIDTHS[] = {wide<1>, wide<2>, wide<3>, wide<4>, wide<5>, wide<6>, wide<7>, wide<8>};

// y [outs] = x [ins] times w [ins, outs]. A thread reads whole rows of w from end to end, several side by
// side, and has sums of its own for each column; those of all threads are added up afterwards.
void product_of_one(ffi::ThreadPool& pool, const float* x, const float* w, float* y, int64_t ins,
                    int64_t outs) {
  const int64_t threads = std::clamp<int64_t>(pool.num_threads(), 4, 16);  // 4: one that wakes late does less
  const int64_t depth = pieces(ins, threads), parts = pieces(ins, depth);
  const std::unique_ptr<float[]> all(new float[parts * outs]);
  float* sums = all.get();  // [parts, outs]
  share(pool, parts, [=](int64_t i) {
    const int64_t start = i * depth, end = std::min(ins, start + depth);
    float* mine = sums + i * outs;
    for (int64_t k = start; k < end; k += ABREAST)
      block<1>(x + k, w + k * outs, mine, std::min(ABREAST, end - k), outs, outs, 1, k == start, 0);
  });
  share(pool, pieces(outs, LENGTH), [=](int64_t i) {
    const int64_t start = i * LENGTH, end = std::min(outs, start + LENGTH);
    std::copy(sums + start, sums + end, y + start);
    for (int64_t part = 1; part < parts; part++)
      for (int64_t n = start; n < end; n++) y[n] += sums[part * outs + n];
  });
}

// y [rows, outs] = x [rows, ins] times w [ins, outs]
ffi::Error product(ffi::ThreadPool pool, Matrix x_, Matrix w_, ffi::Result<Matrix> y_) {
  const int64_t rows = x_.dimensions()[0], ins = x_.dimensions()[1], outs = w_.dimensions()[1];
  if (rows < 1 || rows > MOST || ins < 1 || w_.dimensions()[0] != ins || y_->dimensions()[0] != rows ||
      y_->dimensions()[1] != outs)
    return ffi::Error::InvalidArgument("product: shapes that do not fit");
  const float *x = x_.typed_data(), *w = w_.typed_data();
  float* y = y_->typed_data();
  if (rows == 1) {
    product_of_one(pool, x, w, y, ins, outs);
    return ffi::Error::Success();
  }
  std::vector<float> turned(rows * ins);  // [ins, rows]: what a row of w is multiplied by stands together
  for (int64_t m = 0; m < rows; m++)
    for (int64_t k = 0; k < ins; k++) turned[k * rows + m] = x[m * ins + k];
  const int64_t columns = 2 * LANES * WIDTHS[std::min<int64_t>(rows, TOGETHER) - 1];
  share(pool, pieces(outs, columns), [=, turned = std::move(turned)](int64_t i) {
    const int64_t n = i * columns, count = std::min(columns, outs - n);
    for (int64_t k = 0; k < ins; k += DEPTH) {
      const int64_t depth = std::min(DEPTH, ins - k);
      const int64_t further = k + DEPTH < ins ? DEPTH * outs : 0;  // at the end nothing more is asked for
      for (int64_t m = 0; m < rows; m += TOGETHER)
        BLOCKS[std::min<int64_t>(TOGETHER, rows - m) - 1](turned.data() + k * rows + m, w + k * outs + n,
                                                          y + m * outs + n, depth, count, outs, rows, k == 0,
                                                          further);
    }
  });
  return ffi::Error::Success();
}

// All numbers of a register as one, halves with halves.
template <class Both>
float reduce(Vector a, Both both) {
  float lanes[LANES];
  store(lanes, a);
#pragma GCC unroll 4
  for (int half = LANES / 2; half; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; i++) lanes[i] = both(lanes[i], lanes[half + i]);
  return lanes[0];
}

float sum(Vector a) {
  return reduce(a, [](float x, float y) { return x + y; });
}

// y [M, R] = x [M, ins] times w [R, ins], transposed. Rows of y are `stride` apart.
template <int M, int R>
void dots(const float* x, const float* w, float* y, int64_t ins, int64_t stride) {
  Vector sums[M][R] = {};
  int64_t k = 0;
  for (; k + LANES <= ins; k += LANES) {
    Vector part[R];
    for (int r = 0; r < R; r++) {
      __builtin_prefetch(w + (R + r) * ins + k, 0, 2);
      part[r] = load(w + r * ins + k);
    }
    for (int m = 0; m < M; m++)
      for (int r = 0; r < R; r++) sums[m][r] += load(x + m * ins + k) * part[r];
  }
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) {
      float all = sum(sums[m][r]);
      for (int64_t l = k; l < ins; l++) all += x[m * ins + l] * w[r * ins + l];
      y[m * stride + r] = all;
    }
}

// As `dots`, for any number of rows of w.
template <int M>
void each(const float* x, const float* w, float* y, int64_t ins, int64_t stride, int64_t count) {
  constexpr int64_t side = std::min(4, wide<M>);
  int64_t n = 0;
  for (; n + side <= count; n += side) dots<M, side>(x, w + n * ins, y + n, ins, stride);
  for (; n < count; n++) dots<M, 1>(x, w + n * ins, y + n, ins, stride);
}

using Each = decltype(&each<1>);
constexpr Each EACH[] = {each<1>, each<2>, each<3>, each<4>, each<5>, each<6>, each<7>, each<8>};

// y [rows, outs] = x [rows, ins] times w [outs, ins], transposed
ffi::Error product_turned(ffi::ThreadPool pool, Matrix x_, Matrix w_, ffi::Result<Matrix> y_) {
  const int64_t rows = x_.dimensions()[0], ins = x_.dimensions()[1], outs = w_.dimensions()[0];
  if (rows < 1 || rows > MOST || w_.dimensions()[1] != ins || y_->dimensions()[0] != rows ||
      y_->dimensions()[1] != outs)
    return ffi::Error::InvalidArgument("product: shapes that do not fit");
  const float *x = x_.typed_data(), *w = w_.typed_data();
  float* y = y_->typed_data();
  share(pool, pieces(outs, SOME), [=](int64_t i) {
    const int64_t n = i * SOME, count = std::min(SOME, outs - n);
    for (int64_t m = 0; m < rows; m += TOGETHER)
      EACH[std::min<int64_t>(TOGETHER, rows - m) - 1](x + m * ins, w + n * ins, y + m * outs + n, ins, outs,
                                                      count);
  });
  return ffi::Error::Success();
}

// e to the power of x, which is 0 or less; not a number where x is none.
Vector exponential(Vector x) {
  const Vector magic = Vector{} + 0x1.8p23f;  // added to a number it leaves an integer in the last bits
  x = x < -87.0f ? Vector{} - 87.0f : x;      // from there on powers of two are no longer normal numbers
  const Vector shifted = x * 0x1.715476p0f + magic;  // x = n log 2 + r
  const Vector n = shifted - magic;
  const Vector r = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;
  Vector p = Vector{} + 0x1.a01a02p-13f;  // Taylor's series; |r| < 0.35, and what would follow is below 1e-8
  for (float c : {0x1.6c16c2p-10f, 0x1.111112p-7f, 0x1.555556p-5f, 0x1.555556p-3f, 0.5f, 1.0f, 1.0f})
    p = p * r + c;
  const Integers power = ((Integers)shifted << 23) + (127 << 23);  // the bits of 2 to the power of n
  return p * (Vector)power;
}

// y [T registers] += the sum of weights[i] v[places[i]], where rows of v are `size` apart.
template <int T>
void add_up(const float* weights, const int32_t* places, int64_t count, const float* v, int64_t size,
            float* y) {
  Vector sums[T];
  for (int t = 0; t < T; t++) sums[t] = load(y + t * LANES);
  for (int64_t i = 0; i < count; i++)
    for (int t = 0; t < T; t++) {
      const float* value = v + places[i] * size + t * LANES;
      __builtin_prefetch(value + AHEAD * size, 0, 3);
      sums[t] += weights[i] * load(value);
    }
  for (int t = 0; t < T; t++) store(y + t * LANES, sums[t]);
}

// Attention of queries q [rows, size] of one head to its keys k and values v [length, size]. Query r sees the
// keys that row r modulo `queries` of seen [queries, length] names. What none sees is not read; the row of y
// [rows, size] of a query that sees nothing is zero.
void head(const float* q, const float* k, const float* v, const bool* seen, float* y, int64_t rows,
          int64_t queries, int64_t length, int64_t size) {
  const int64_t padded = pieces(length, LANES) * LANES;
  const float scale = 1 / __builtin_sqrtf(size), lowest = -3e38f;
  std::vector<int32_t> places(queries * length);  // the keys that a query sees, one after the other
  std::vector<int64_t> counts(queries);
  for (int64_t j = 0; j < queries; j++)
    for (int64_t l = 0; l < length; l++)
      if (seen[j * length + l]) places[j * length + counts[j]++] = l;
  const int64_t most = *std::max_element(counts.begin(), counts.end());
  std::vector<float> weights(rows * padded, lowest);
  const auto ask = [=](const float* row) {
    for (int64_t d = 0; d < size; d += 16) __builtin_prefetch(row + d, 0, 3);
  };

  for (int64_t start = 0; start < most; start += KEYS)
    for (int64_t r = 0; r < rows; r++) {
      const int64_t j = r % queries, end = std::min(start + KEYS, counts[j]);
      for (int64_t i = start; i < end; i++) {
        const float* key = k + places[j * length + i] * size;
        if (r == 0) ask(key + AHEAD * size);
        Vector products{};
        for (int64_t d = 0; d < size; d += LANES) products += load(q + r * size + d) * load(key + d);
        weights[r * padded + i] = sum(products) * scale;
      }
    }
  for (int64_t i = 0; i < std::min(AHEAD, counts[0]); i++) ask(v + places[i] * size);

  for (int64_t r = 0; r < rows; r++) {
    float* mine = weights.data() + r * padded;
    const int64_t count = counts[r % queries];
    Vector tops = Vector{} + lowest, total{};
    for (int64_t i = 0; i < count; i += LANES) tops = load(mine + i) > tops ? load(mine + i) : tops;
    const float highest = reduce(tops, [](float a, float b) { return b > a ? b : a; });
    for (int64_t i = 0; i < count; i += LANES) {
      const Vector weight = exponential(load(mine + i) - highest);
      store(mine + i, weight);
      total += weight;  // of what is past the end 1e-38
    }
    const float all = sum(total);
    for (int64_t i = 0; i < count; i++) mine[i] /= all;
  }

  std::fill(y, y + rows * size, 0.0f);
  for (int64_t start = 0; start < most; start += KEYS)
    for (int64_t r = 0; r < rows; r++) {
      const int64_t j = r % queries, count = std::min(start + KEYS, counts[j]) - start;
      const float* mine = weights.data() + r * padded + start;
      const int32_t* at = places.data() + j * length + start;
      int64_t d = 0;
      for (; d + 4 * LANES <= size; d += 4 * LANES) add_up<4>(mine, at, count, v + d, size, y + r * size + d);
      for (; d < size; d += LANES) add_up<1>(mine, at, count, v + d, size, y + r * size + d);
    }
}

// q and y [batch * heads, group * queries, size], k and v [batch * heads, length, size],
// seen [batch, queries, length]
ffi::Error attention(ffi::ThreadPool pool, Cube q_, Cube k_, Cube v_, Seen seen_, ffi::Result<Cube> y_) {
  const auto q_shape = q_.dimensions(), k_shape = k_.dimensions(), seen_shape = seen_.dimensions();
  const int64_t all = q_shape[0], rows = q_shape[1], size = q_shape[2], length = k_shape[1];
  const int64_t batch = seen_shape[0], queries = seen_shape[1];
  if (batch < 1 || queries < 1 || all % batch || rows % queries || size % LANES || k_shape[0] != all ||
      k_shape[2] != size || seen_shape[2] != length || !same(k_shape, v_.dimensions()) ||
      !same(q_shape, y_->dimensions()))
    return ffi::Error::InvalidArgument("attention: shapes that do not fit");
  const float *q = q_.typed_data(), *k = k_.typed_data(), *v = v_.typed_data();
  const bool* seen = seen_.typed_data();
  float* y = y_->typed_data();
  share(pool, all, [=](int64_t i) {
    const bool* shown = seen + i / (all / batch) * queries * length;
    head(q + i * rows * size, k + i * length * size, v + i * length * size, shown, y + i * rows * size, rows,
         queries, length, size);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    Product, product, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Arg<Matrix>().Ret<Matrix>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    ProductTurned, product_turned,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Arg<Matrix>().Ret<Matrix>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    Attention, attention,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Cube>().Arg<Cube>().Arg<Cube>().Arg<Seen>().Ret<Cube>());
