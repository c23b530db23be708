// The loops of search.h.

#include "search.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "processors.h"

namespace keras_rmsprop {
namespace {

constexpr int kSums = 32;  // always of the same elements: the same result everywhere
constexpr int64_t kMost = 8 * kSums;  // sums of so few elements are in T

template <typename T>
struct Run {
  int64_t size, stride;
  T forgetting, weight;
};

// Sums of which each is of some elements.
template <typename T>
struct Lanes {
  T gain[kSums] = {}, length[kSums] = {}, ahead[kSums] = {}, both[kSums] = {};
};

// Elements one after the other are a loop of their own, as it is vectorised; and so are
// those with momentum.
template <bool kOneByOne, bool kMoves, typename T, typename W>
EACH_PROCESSOR void FollowRun(const Run<T>& run, const T* __restrict gradient,
                              const W* __restrict weights,
                              const T* __restrict first, T* __restrict sums,
                              const T* __restrict momentum, Lanes<T>* __restrict lanes) {
  const int64_t size = run.size, stride = kOneByOne ? 1 : run.stride;
  const T forgetting = run.forgetting, weight = run.weight;
  const auto add = [&](int64_t i, int j) {
    const T g = gradient[i * stride];
    const T x = static_cast<T>(weights[i * stride]);
    const T s = forgetting * sums[i] + weight * g;
    sums[i] = s;
    lanes->gain[j] += g * (first[i] - x);
    lanes->length[j] += std::abs(s);
    if constexpr (kMoves) {
      const T product = g * momentum[i * stride];
      lanes->ahead[j] += product;
      lanes->both[j] += std::abs(product);
    }
  };
  int64_t i = 0;
  for (; i + kSums <= size; i += kSums) {
    for (int j = 0; j < kSums; ++j) add(i + j, j);
  }
  for (int j = 0; i + j < size; ++j) add(i + j, j);
}

// In doubles all the way it took twice as long.
template <typename T>
EACH_PROCESSOR void Move(Lanes<T>* __restrict lanes, Lanes<double>* __restrict total) {
  for (int j = 0; j < kSums; ++j) {
    total->gain[j] += lanes->gain[j];
    total->length[j] += lanes->length[j];
    total->ahead[j] += lanes->ahead[j];
    total->both[j] += lanes->both[j];
  }
  *lanes = {};
}

// Short runs in one loop: to begin a run costs more than its elements.
template <typename T, typename W>
Sums FollowShort(const Followed<T, W>& part, int64_t start, int64_t size, T forgetting,
                 T weight, bool begins) {
  const Sample sample = part.sample;
  Sums sums;
  int64_t place = start % sample.run;
  int64_t begin = start / sample.run * sample.pitch;
  for (int64_t i = start; i < start + size; ++i) {
    const int64_t at = begin + place * sample.stride;
    const T g = part.gradient[at], x = static_cast<T>(part.weights[at]);
    if (begins) part.first_weights[i] = x;
    const T s = forgetting * part.gradient_sums[i] + weight * g;
    part.gradient_sums[i] = s;
    sums.gain += double(g) * double(part.first_weights[i] - x);
    sums.length += std::abs(double(s));
    if (part.momentum) {
      const double product = double(g) * double(part.momentum[at]);
      sums.ahead += product;
      sums.both += std::abs(product);
    }
    if (++place == sample.run) {
      place = 0;
      begin += sample.pitch;
    }
  }
  return sums;
}

// The bits of a number: those of its exponent, and those below.
template <typename T>
struct Bits;
template <>
struct Bits<float> {
  using Int = int32_t;
  static constexpr int kFraction = 23;
  static constexpr Int kExponent = 0xff, kBias = 127;
};
template <>
struct Bits<double> {
  using Int = int64_t;
  static constexpr int kFraction = 52;
  static constexpr Int kExponent = 0x7ff, kBias = 1023;
};

// The logarithm of a product instead of many: x = fraction * 2^exponent, where a product
// of 64 fractions, each less than 2, is finite.
template <typename T>
EACH_PROCESSOR void AddLogs(const T* __restrict x, int64_t size, Logs* logs) {
  using Int = typename Bits<T>::Int;
  constexpr Int kOne = Bits<T>::kBias << Bits<T>::kFraction;
  constexpr Int kFractionBits = (Int{1} << Bits<T>::kFraction) - 1;
  T product[kSums];
  Int exponent[kSums] = {}, count[kSums] = {};
  for (T& p : product) p = 1;
  for (int64_t i = 0; i < size; i += kSums) {
    T rest[kSums] = {};
    if (size - i < kSums) std::copy(x + i, x + size, rest);
    const T* from = size - i < kSums ? rest : x + i;
    for (int j = 0; j < kSums; ++j) {
      Int bits;
      std::memcpy(&bits, from + j, sizeof bits);
      const Int e = bits >> Bits<T>::kFraction & Bits<T>::kExponent;
      const Int counts = (e != 0) & (e != Bits<T>::kExponent);  // a branch is slower
      const Int of_fraction = (bits & kFractionBits & -counts) | kOne;
      T fraction;
      std::memcpy(&fraction, &of_fraction, sizeof fraction);
      product[j] *= fraction;
      exponent[j] += (e - Bits<T>::kBias) & -counts;
      count[j] += counts;
    }
  }
  for (int j = 0; j < kSums; ++j) {
    logs->total += std::log(double(product[j])) + double(exponent[j]) * std::log(2.0);
    logs->count += count[j];
  }
}

}  // namespace

template <typename T>
Logs LogsOf(const T* x, int64_t size) {
  constexpr int64_t kFinite = 64 * kSums;
  Logs logs;
  for (int64_t i = 0; i < size; i += kFinite) {
    AddLogs(x + i, std::min(kFinite, size - i), &logs);
  }
  return logs;
}
template Logs LogsOf(const float*, int64_t);
template Logs LogsOf(const double*, int64_t);

template <typename T, typename W>
Sums Follow(const Followed<T, W>& part, int64_t start, int64_t size, T forgetting,
            T weight, bool begins) {
  Sample sample = part.sample;
  // Runs of one element are one run.
  if (sample.run == 1) sample = {start + size, 0, sample.pitch};
  if (sample.run < kSums) {
    return FollowShort(part, start, size, forgetting, weight, begins);
  }
  constexpr auto kLoops = std::array{FollowRun<false, false, T, W>,
                                     FollowRun<false, true, T, W>,
                                     FollowRun<true, false, T, W>,
                                     FollowRun<true, true, T, W>};
  const auto follow = kLoops[2 * (sample.stride == 1) + (part.momentum != nullptr)];
  Lanes<T> lanes;
  Lanes<double> total;
  int64_t added = 0;
  for (int64_t i = start; i < start + size;) {
    const int64_t place = i % sample.run;
    const int64_t from = i / sample.run * sample.pitch + place * sample.stride;
    const Run<T> run = {
        std::min({sample.run - place, start + size - i, kMost - added}),
        sample.stride, forgetting, weight};
    if (begins) {
      for (int64_t j = 0; j < run.size; ++j) {
        part.first_weights[i + j] =
            static_cast<T>(part.weights[from + j * sample.stride]);
      }
    }
    follow(run, part.gradient + from, part.weights + from, part.first_weights + i,
           part.gradient_sums + i, part.momentum ? part.momentum + from : nullptr,
           &lanes);
    i += run.size;
    added += run.size;
    if (added == kMost || i == start + size) {
      Move(&lanes, &total);
      added = 0;
    }
  }
  Sums sums;
  for (int j = 0; j < kSums; ++j) {
    sums.Add({total.gain[j], total.length[j], total.ahead[j], total.both[j]}, 1);
  }
  return sums;
}

template <typename T, typename W>
T Farthest(const Followed<T, W>& part) {
  const Sample sample = part.sample;
  T farthest = 0;
  for (int64_t i = 0; i < part.looked_at; ++i) {
    const int64_t at =
        i / sample.run * sample.pitch + i % sample.run * sample.stride;
    const T way = std::abs(static_cast<T>(part.weights[at]) - part.first_weights[i]);
    if (!(way <= farthest)) farthest = way;
    if (std::isnan(farthest)) break;
  }
  return farthest;
}

Estimate Again(const Search& search) {
  const float initial = search.initial;
  return {initial, 0, 0, 0, -1, initial, 0, 1};
}

float WeightOf(const Estimate& old, const Search& search, float factor, float scale) {
  const float square = old.distance * old.distance;
  return factor * square / static_cast<float>(search.initial) * scale;
}

Estimate After(const Estimate& old, const Search& search, float factor, float weight,
               float sign, const Sums& sums) {
  const float lasting = search.lasting;
  const float tiny = search.tiny, turning = search.turning;
  Estimate now;
  const float back = static_cast<float>(sums.ahead) /
                     (static_cast<float>(sums.both) + tiny);
  now.back = turning * old.back - static_cast<float>(1 - search.turning) * sign * back;
  now.gain = static_cast<float>(search.forgetting) * old.gain +
             sign * weight * static_cast<float>(sums.gain);
  now.steps = old.steps + 1;
  const float fading =
      old.distance * std::sqrt((old.steps + lasting) / (now.steps + lasting));
  const float found = static_cast<float>(search.coefficient) * now.gain /
                      (static_cast<float>(sums.length) + tiny);
  const float least = std::max(fading, static_cast<float>(search.initial));
  // The order decides what a NaN does: it stays.
  now.distance = std::max(std::isnan(fading) ? fading : found, least);
  now.distance = std::min(now.distance, static_cast<float>(search.most));
  const float growth = search.growth;
  if (!std::isinf(growth)) now.distance = std::min(now.distance, growth * old.distance);
  const float from = search.back, beyond = (now.back - from) / (1 - from);
  const float h = 1 - static_cast<float>(search.fall) * std::max(beyond, 0.0f) +
                  static_cast<float>(search.rise) * std::max(-now.back, 0.0f);
  const float weakest = static_cast<float>(search.initial) / now.distance;
  now.brake = std::min(std::max(h * old.brake, weakest), 1.0f);
  now.path = old.path + factor * now.distance;
  now.reach = 0;
  now.longest = std::max(old.longest, now.distance);
  return now;
}

#define INSTANTIATE(T, W)                                                         \
  template Sums Follow(const Followed<T, W>&, int64_t, int64_t, T, T, bool); \
  template T Farthest(const Followed<T, W>&)
INSTANTIATE(float, float);
INSTANTIATE(float, Bfloat16);
INSTANTIATE(float, Half);
INSTANTIATE(double, double);
INSTANTIATE(double, float);

}  // namespace keras_rmsprop
