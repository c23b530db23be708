// The arithmetic of the kernel, beside a plain loop in long double. `make sanitize`
// builds it with sanitizers: each buffer is exactly as long as it should be.

#include "../keras_rmsprop/kernel/rows.h"
#include "../keras_rmsprop/kernel/search.h"
#include "../keras_rmsprop/kernel/step.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

using keras_rmsprop::Bfloat16;
using keras_rmsprop::Coded;
using keras_rmsprop::Decay;
using keras_rmsprop::Followed;
using keras_rmsprop::Half;
using keras_rmsprop::kBlock;
using keras_rmsprop::Numbers;
using keras_rmsprop::Part;
using keras_rmsprop::Piece;
using keras_rmsprop::Request;
using keras_rmsprop::Sample;
using keras_rmsprop::Sums;
using keras_rmsprop::Ticks;

std::mt19937 random_bits(0);

template <typename T>
std::unique_ptr<T[]> Draw(int64_t size, bool positive) {
  std::normal_distribution<float> normal;
  auto x = std::make_unique<T[]>(size);
  for (int64_t i = 0; i < size; ++i) {
    const float y = normal(random_bits);
    x[i] = static_cast<T>(positive ? std::abs(y) : y);
  }
  return x;
}

void Expect(long double got, long double want, double tolerance, const char* what) {
  if (std::abs(got - want) <= tolerance * std::max(1.0L, std::abs(want))) return;
  std::printf("%s: %Lg instead of %Lg\n", what, got, want);
  std::exit(1);
}

// What most steps here are asked for.
Request Asked() {
  Request request = {};
  request.scale = request.correction = 1;
  request.learning_rate = 0.01;
  request.rho = 0.9;
  request.momentum = 0.8;
  request.epsilon = 0.1;
  request.epsilon_inside_sqrt = request.lr_in_momentum = true;
  return request;
}

template <typename T>
Decay<T> DecayOf(double penalty, double taken) {
  Decay<T> decay;
  decay.penalty = static_cast<T>(penalty);
  decay.taken = static_cast<T>(taken);
  return decay;
}

template <typename T, typename W>
void TestStep(int64_t size, int options, double tolerance) {
  const bool centered = options & 1, momentum = options & 2, nesterov = options & 4;
  const bool corrected = options & 8, decays = options & 16, inside = options & 32;
  const bool cautious = momentum && (options & 64);
  auto g = Draw<T>(size, false);
  auto w = Draw<W>(size, false);
  auto v = Draw<T>(size, true), m = Draw<T>(size, false), a = Draw<T>(size, false);
  for (int64_t i = 0; i < size; ++i) a[i] /= 10;
  constexpr bool may_average = std::is_same_v<T, W>;
  const bool averages = may_average && (options & 1) == (options >> 1 & 1);
  auto average = Draw<T>(size, false);
  auto update = Draw<T>(size, false);
  Request request = Asked();
  request.scale = -0.5;
  request.correction = corrected ? .4 : 1;
  request.share = 0.7;
  request.epsilon_inside_sqrt = inside;
  request.nesterov = nesterov;
  request.cautious = cautious;
  const Numbers<T> n(request);
  const Part<T, W, T> part = {
      size,
      g.get(),
      w.get(),
      v.get(),
      momentum ? m.get() : nullptr,
      centered ? a.get() : nullptr,
      DecayOf<T>(decays && inside ? .2 : 0, decays && !inside ? .003 : 0),
      averages ? average.get() : nullptr,
      cautious ? update.get() : nullptr,
  };
  auto copy = [size](const auto& x) {
    auto y = std::make_unique<long double[]>(size);
    for (int64_t i = 0; i < size; ++i) {
      y[i] = static_cast<long double>(static_cast<T>(x[i]));
    }
    return y;
  };
  auto w0 = copy(w), v0 = copy(v), m0 = copy(m), a0 = copy(a);
  auto average0 = copy(average);
  keras_rmsprop::StepAll(n, std::vector<Part<T, W, T>>{part},
                         [](const std::vector<Piece>& pieces, auto step) {
                           for (size_t i = 0; i < pieces.size(); ++i) step(i, pieces[i]);
                         });
  auto agrees = std::make_unique<bool[]>(size);
  int64_t agreeing = 0;
  for (int64_t i = 0; i < size && cautious; ++i) {
    // Its sign is that of what is taken, however small the difference.
    const long double gradient = n.scale * g[i] + part.decay.penalty * w0[i];
    agrees[i] = update[i] != 0;
    agreeing += agrees[i];
    Expect(agrees[i] && update[i] * gradient <= 0, false, 0, "agreement");
  }
  const long double mean =
      std::max(0.001L, static_cast<long double>(agreeing) / std::max<int64_t>(size, 1));
  for (int64_t i = 0; i < size; ++i) {
    const long double gradient = n.scale * g[i] + part.decay.penalty * w0[i];
    v0[i] = n.rho * v0[i] + n.rest * gradient * gradient;
    a0[i] = n.rho * a0[i] + n.rest * gradient;
    long double spread = v0[i] / n.correction;
    if (centered) spread -= a0[i] * a0[i] / (n.correction * n.correction);
    spread = std::max(spread, 0.0L);
    const long double root = std::sqrt(spread + n.epsilon_inside) + n.epsilon_outside;
    long double u = n.rate_inside * gradient / root;
    if (momentum) {
      m0[i] = n.momentum * m0[i] + u;
      u = nesterov ? n.momentum * m0[i] + u : m0[i];
      Expect(m[i], m0[i], 1e-5, "momentum");
    }
    if (cautious) {
      const long double least = 1e-6L;  // nearer to 0 it may have either sign
      if (std::abs(u) > least) Expect(agrees[i], u * gradient > 0, 0, "agreement");
      u = agrees[i] ? u / mean : 0;
    }
    Expect(v[i], v0[i], 1e-5, "velocity");
    if (centered) Expect(a[i], a0[i], 1e-5, "average gradient");
    const long double want = w0[i] - n.rate_outside * u - part.decay.taken * w0[i];
    Expect(static_cast<T>(w[i]), want, tolerance, "weight");
    if (averages) average0[i] = 0.7L * average0[i] + 0.3L * want;
    Expect(average[i], average0[i], 1e-4, "average");
  }
}

template <typename T, typename W>
void TestFollow(Sample sample, int64_t runs, bool begins, bool moves) {
  const int64_t size = sample.run * runs;
  const int64_t all = size ? (runs - 1) * sample.pitch + (sample.run - 1) * sample.stride + 1
                           : 0;
  auto g = Draw<T>(all, false), first = Draw<T>(size, false);
  auto sums = Draw<T>(size, false), m = Draw<T>(all, false);
  auto w = Draw<W>(all, false);
  auto first0 = std::make_unique<T[]>(size), sums0 = std::make_unique<T[]>(size);
  std::copy_n(first.get(), size, first0.get());
  std::copy_n(sums.get(), size, sums0.get());
  Followed<T, W> part = {sample,  size,        all,       g.get(),
                         w.get(), first.get(), sums.get(), moves ? m.get() : nullptr};
  T farthest = 0;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t j = i / sample.run * sample.pitch + i % sample.run * sample.stride;
    farthest = std::max(farthest, std::abs(static_cast<T>(w[j]) - first[i]));
  }
  Expect(Farthest(part), farthest, 0, "farthest");
  long double gain = 0, length = 0, ahead = 0, both = 0;
  Sums found;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t j = i / sample.run * sample.pitch + i % sample.run * sample.stride;
    const T x = static_cast<T>(w[j]);
    if (begins) first0[i] = x;
    const long double s = T(0.9) * static_cast<long double>(sums0[i]) + T(0.3) * g[j];
    gain += static_cast<long double>(g[j]) * (first0[i] - x);
    length += std::abs(s);
    if (moves) {
      const long double product = static_cast<long double>(g[j]) * m[j];
      ahead += product;
      both += std::abs(product);
    }
    sums0[i] = static_cast<T>(s);
  }
  const int64_t step = sample.run < 100 ? 13 : 701;
  for (int64_t i = 0; i < size; i += step) {  // a call may begin within a run
    const Sums some =
        Follow(part, i, std::min(step, size - i), T(0.9), T(0.3), begins);
    found.Add(some, 1);
  }
  Expect(found.gain, gain, 1e-5, "gain");
  Expect(found.length, length, 1e-5, "length");
  Expect(found.ahead, ahead, 1e-5, "sum of g m");
  Expect(found.both, both, 1e-5, "sum of |g m|");
  for (int64_t i = 0; i < size; ++i) {
    Expect(first[i], first0[i], 0, "first weight");
    Expect(sums[i], sums0[i], 1e-6, "gradient sum");
  }
}

// Rows 4, 0 and 3 of five: as if each were a variable whose averages have faded.
template <typename T, typename W, typename I>
void TestRows(int64_t width, bool all) {
  constexpr int64_t kRows = 5;
  const std::vector<I> ids = {4, 0, 3};
  auto g = Draw<T>(3 * width, false);
  auto w = Draw<W>(kRows * width, false);
  auto v = Draw<T>(kRows * width, true), m = Draw<T>(kRows * width, false);
  auto a = Draw<T>(kRows * width, false);
  std::vector<W> w0(w.get(), w.get() + kRows * width);
  std::vector<T> v0(v.get(), v.get() + kRows * width);
  std::vector<T> m0(m.get(), m.get() + kRows * width);
  std::vector<T> a0(a.get(), a.get() + kRows * width);
  auto last = std::make_unique<int32_t[]>(kRows);
  std::vector<int32_t> last0 = {7, 2, 0, 5, 7};
  std::copy(last0.begin(), last0.end(), last.get());
  const Numbers<T> n(Asked());
  const auto decay = DecayOf<T>(0, .003);
  const Part<T, W, T> table = {width, g.get(), w.get(), v.get(), all ? m.get() : nullptr,
                            all ? a.get() : nullptr, decay, nullptr, nullptr};
  const Ticks ticks = {7, last.get()};
  keras_rmsprop::StepRows(n, table, ticks, ids.data(), 0, 1);
  keras_rmsprop::StepRows(n, table, ticks, ids.data(), 1, 2);
  for (int64_t i = 0; i < 3; ++i) {
    const int64_t at = ids[i] * width;
    for (int64_t j = at; j < at + width; ++j) {
      for (int k = last0[ids[i]]; k < 7; ++k) {
        v0[j] *= n.rho;
        if (all) a0[j] *= n.rho;
      }
    }
    Part<T, W, T> row = {width, g.get() + i * width, &w0[at], &v0[at],
                      all ? &m0[at] : nullptr, all ? &a0[at] : nullptr, decay,
                      nullptr, nullptr};
    keras_rmsprop::Step(n, row);
    last0[ids[i]] = 8;
  }
  for (int64_t j = 0; j < kRows * width; ++j) {
    Expect(static_cast<T>(w[j]), static_cast<T>(w0[j]), 1e-2, "weight of a row");
    Expect(v[j], v0[j], 1e-5, "velocity of a row");
    Expect(m[j], m0[j], 1e-5, "momentum of a row");
    Expect(a[j], a0[j], 1e-5, "average gradient of a row");
  }
  for (int i = 0; i < kRows; ++i) Expect(last[i], last0[i], 0, "clock of a row");
}

// A step with slots in blocks, beside one with the numbers that they stand for.
void TestBlocks(int64_t size, bool momentum) {
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  auto v = std::make_unique<Coded[]>(blocks), m = std::make_unique<Coded[]>(blocks);
  auto plain_v = std::make_unique<float[]>(blocks * kBlock);
  auto plain_m = std::make_unique<float[]>(blocks * kBlock);
  for (int64_t b = 0; b < blocks; ++b) {
    for (int i = 0; i < kBlock; ++i) {
      const bool is_one = b * kBlock + i < size;
      v[b].codes[i] = is_one * random_bits();
      m[b].codes[i] = is_one * random_bits();
      if (m[b].codes[i] == 128) m[b].codes[i] = 0;  // no code
    }
    v[b].scale = 0.5f * (b + 1), m[b].scale = 0.01f * (b + 1);
    keras_rmsprop::Decode(v[b], false, &plain_v[b * kBlock]);
    keras_rmsprop::Decode(m[b], true, &plain_m[b * kBlock]);
    Coded again;  // to the nearest: the codes of the same numbers, but for the scale
    v[b].codes[0] = 255, m[b].codes[0] = 129;
    keras_rmsprop::Decode(v[b], false, &plain_v[b * kBlock]);
    keras_rmsprop::Decode(m[b], true, &plain_m[b * kBlock]);
    keras_rmsprop::Encode(&plain_v[b * kBlock], false, 0, &again);
    for (int i = 0; i < kBlock; ++i) Expect(again.codes[i], v[b].codes[i], 0, "code");
    keras_rmsprop::Encode(&plain_m[b * kBlock], true, 0, &again);
    for (int i = 0; i < kBlock; ++i) Expect(again.codes[i], m[b].codes[i], 0, "code");
    Expect(again.scale, m[b].scale, 0, "scale");
  }
  auto g = Draw<float>(size, false), w = Draw<float>(size, false);
  auto w0 = std::make_unique<float[]>(size);
  std::copy_n(w.get(), size, w0.get());
  Request request = Asked();
  request.draw = 5;
  const Numbers<float> n(request);
  keras_rmsprop::Step(n, Part<float, float, Coded>{size, g.get(), w.get(), v.get(),
                                                   momentum ? m.get() : nullptr, nullptr,
                                                   {}, nullptr, nullptr});
  keras_rmsprop::Step(n, Part<float, float, float>{
                             size, g.get(), w0.get(), plain_v.get(),
                             momentum ? plain_m.get() : nullptr, nullptr, {}, nullptr, nullptr});
  for (int64_t i = 0; i < size; ++i) Expect(w[i], w0[i], 0, "weight beside blocks");
  float kept[kBlock];
  for (int64_t b = 0; b < blocks; ++b) {
    keras_rmsprop::Decode(v[b], false, kept);
    for (int i = 0; i < kBlock; ++i) {
      const float want = plain_v[b * kBlock + i];
      Expect(kept[i], want, want / 3 + v[b].scale * 1e-4, "velocity in a block");
    }
    if (!momentum) continue;
    keras_rmsprop::Decode(m[b], true, kept);
    for (int i = 0; i < kBlock; ++i) {
      const float want = plain_m[b * kBlock + i];
      Expect(kept[i], want, std::abs(want) / 3 + m[b].scale * 1e-3, "momentum in a block");
    }
  }
}

void TestGroups(int64_t count, int32_t rows) {
  constexpr int64_t kWidth = 3;
  std::vector<int32_t> ids(count);
  for (auto& id : ids) id = random_bits() % rows;
  auto slices = Draw<float>(count * kWidth, false);
  const auto groups = keras_rmsprop::GroupsOf(ids.data(), count);
  std::vector<int32_t> distinct;
  for (const int32_t id : ids) {
    if (std::find(distinct.begin(), distinct.end(), id) == distinct.end()) {
      distinct.push_back(id);
    }
  }
  const int64_t found = groups.ends.size();
  Expect(found, distinct.size(), 0, "number of rows");
  auto sums = std::make_unique<float[]>(found * kWidth);
  const int64_t some = found / 2;
  keras_rmsprop::SumRows(groups, kWidth, slices.get(), 0, some, sums.get());
  keras_rmsprop::SumRows(groups, kWidth, slices.get(), some, found - some, sums.get());
  for (int64_t j = 0; j < found; ++j) {
    for (int64_t k = 0; k < kWidth; ++k) {
      long double sum = 0;
      for (int64_t i = 0; i < count; ++i) {
        if (ids[i] == distinct[j]) sum += slices[i * kWidth + k];
      }
      Expect(sums[j * kWidth + k], sum, 1e-5, "sum of slices");
    }
  }
}

int main() {
  for (const int64_t count : {0, 1, 2, 17, 500}) {
    for (const int32_t rows : {1, 7, 1000}) TestGroups(count, rows);
  }
  for (const int64_t size : {0, 1, 255, 256, 257, 1001}) {
    for (const bool momentum : {false, true}) TestBlocks(size, momentum);
  }
  for (const int64_t width : {1, 7, 64}) {
    for (const bool all : {false, true}) {
      TestRows<float, float, int32_t>(width, all);
      TestRows<float, Bfloat16, int64_t>(width, all);
      TestRows<float, Half, int32_t>(width, all);
      TestRows<double, double, int64_t>(width, all);
      TestRows<double, float, int32_t>(width, all);
    }
  }
  for (const Sample sample : {Sample{1, 1, 1}, {1, 3, 1}, {37, 37, 1}, {5, 40, 1}, {3, 10, 4}, {1000, 1003, 1}, {900, 3600, 4}}) {
    for (const int64_t runs : {0, 1, 2, 29}) {
      for (const bool begins : {false, true}) {
        for (bool moves : {false, true}) {
          TestFollow<float, float>(sample, runs, begins, moves);
          TestFollow<double, double>(sample, runs, begins, moves);
          TestFollow<double, float>(sample, runs, begins, moves);
          TestFollow<float, Bfloat16>(sample, runs, begins, moves);
          TestFollow<float, Half>(sample, runs, begins, moves);
        }
      }
    }
  }
  for (int64_t size : {0, 1, 7, 8, 9, 64, 1001}) {
    for (int options = 0; options < 128; ++options) {
      TestStep<float, float>(size, options, 1e-4);
      TestStep<double, double>(size, options, 1e-9);
      TestStep<double, float>(size, options, 1e-4);
      TestStep<float, Bfloat16>(size, options, 2e-2);
      TestStep<float, Half>(size, options, 2e-3);
    }
    auto x = Draw<float>(size, false);
    long double sum = 0;
    for (int64_t i = 0; i < size; ++i) sum += static_cast<long double>(x[i]) * x[i];
    Expect(keras_rmsprop::Squares(x.get(), size), sum, 1e-12, "squares");
  }
  std::puts("The arithmetic of the kernel is right.");
}
