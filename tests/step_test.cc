// The arithmetic of the kernel, beside a plain loop in long double. `make sanitize`
// builds it with sanitizers: each buffer is exactly as long as it should be.

#include "../keras_rmsprop/kernel/search.h"
#include "../keras_rmsprop/kernel/step.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <type_traits>

using keras_rmsprop::Bfloat16;
using keras_rmsprop::Followed;
using keras_rmsprop::Half;
using keras_rmsprop::Numbers;
using keras_rmsprop::Part;
using keras_rmsprop::Sample;
using keras_rmsprop::Sums;

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

template <typename T, typename W>
void TestStep(int64_t size, int options, double tolerance) {
  const bool centered = options & 1, momentum = options & 2, nesterov = options & 4;
  const bool corrected = options & 8, decays = options & 16, inside = options & 32;
  auto g = Draw<T>(size, false);
  auto w = Draw<W>(size, false);
  auto v = Draw<T>(size, true), m = Draw<T>(size, false), a = Draw<T>(size, false);
  for (int64_t i = 0; i < size; ++i) a[i] /= 10;
  constexpr bool may_average = std::is_same_v<T, W>;
  const bool averages = may_average && (options & 1) == (options >> 1 & 1);
  auto average = Draw<T>(size, false);
  Numbers<T> n = {T(-0.5), T(0.9),  T(0.1), T(0.8), T(inside ? .1 : 0),
                  T(inside ? 0 : .1), T(corrected ? .4 : 1), T(0.01), T(1), nesterov,
                  T(0.7)};
  Part<T, W> part = {size, g.get(), w.get(), v.get(), momentum ? m.get() : nullptr,
                     centered ? a.get() : nullptr, T(decays ? .2 : 0),
                     T(decays ? .003 : 0), averages ? average.get() : nullptr};
  auto copy = [size](const auto& x) {
    auto y = std::make_unique<long double[]>(size);
    for (int64_t i = 0; i < size; ++i) {
      y[i] = static_cast<long double>(static_cast<T>(x[i]));
    }
    return y;
  };
  auto w0 = copy(w), v0 = copy(v), m0 = copy(m), a0 = copy(a);
  auto average0 = copy(average);
  keras_rmsprop::Step(n, part);
  for (int64_t i = 0; i < size; ++i) {
    const long double gradient = n.scale * g[i] + part.penalty * w0[i];
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
    Expect(v[i], v0[i], 1e-5, "velocity");
    if (centered) Expect(a[i], a0[i], 1e-5, "average gradient");
    const long double want = w0[i] - n.rate_outside * u - part.decay * w0[i];
    Expect(static_cast<T>(w[i]), want, tolerance, "weight");
    if (averages) average0[i] = 0.7L * average0[i] + 0.3L * want;
    Expect(average[i], average0[i], 1e-4, "average");
  }
}

template <typename T, typename W>
void TestFollow(Sample sample, int64_t runs, bool begins) {
  const int64_t size = sample.run * runs;
  const int64_t all = size ? (runs - 1) * sample.pitch + (sample.run - 1) * sample.stride + 1
                           : 0;
  auto g = Draw<T>(all, false), first = Draw<T>(size, false);
  auto sums = Draw<T>(size, false);
  auto w = Draw<W>(all, false);
  auto first0 = std::make_unique<T[]>(size), sums0 = std::make_unique<T[]>(size);
  std::copy_n(first.get(), size, first0.get());
  std::copy_n(sums.get(), size, sums0.get());
  Followed<T, W> part = {sample, g.get(), w.get(), first.get(), sums.get()};
  long double gain = 0, length = 0;
  double found_gain = 0, found_length = 0;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t j = i / sample.run * sample.pitch + i % sample.run * sample.stride;
    const T x = static_cast<T>(w[j]);
    if (begins) first0[i] = x;
    const long double s = T(0.9) * static_cast<long double>(sums0[i]) + T(0.3) * g[j];
    gain += static_cast<long double>(g[j]) * (first0[i] - x);
    length += std::abs(s);
    sums0[i] = static_cast<T>(s);
  }
  for (int64_t i = 0; i < size; i += 13) {  // a call may begin within a run
    const Sums some =
        Follow(part, i, std::min<int64_t>(13, size - i), T(0.9), T(0.3), begins);
    found_gain += some.gain;
    found_length += some.length;
  }
  Expect(found_gain, gain, 1e-5, "gain");
  Expect(found_length, length, 1e-5, "length");
  for (int64_t i = 0; i < size; ++i) {
    Expect(first[i], first0[i], 0, "first weight");
    Expect(sums[i], sums0[i], 1e-6, "gradient sum");
  }
}

int main() {
  for (const Sample sample : {Sample{1, 1, 1}, {37, 37, 1}, {5, 40, 1}, {3, 10, 4}}) {
    for (const int64_t runs : {0, 1, 2, 29}) {
      for (const bool begins : {false, true}) {
        TestFollow<float, float>(sample, runs, begins);
        TestFollow<double, double>(sample, runs, begins);
        TestFollow<double, float>(sample, runs, begins);
        TestFollow<float, Bfloat16>(sample, runs, begins);
        TestFollow<float, Half>(sample, runs, begins);
      }
    }
  }
  for (int64_t size : {0, 1, 7, 8, 9, 64, 1001}) {
    for (int options = 0; options < 64; ++options) {
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
