// The twin of `distinct`, `update` and `faded` in sparse.py.

#include "rows.h"

#include <algorithm>
#include <cmath>

namespace keras_rmsprop {
namespace {

constexpr int64_t kAhead = 4;         // how many rows ahead one is asked for
constexpr int64_t kPrefetched = 512;  // in longer rows the processor sees the pattern

template <typename T>
void Multiply(T factor, int64_t size, T* values) {
  for (int64_t i = 0; i < size; ++i) values[i] *= factor;
}

// Asks for a row that will be needed soon: where it is, no processor can guess.
template <typename T>
void Prefetch(const T* row, int64_t width) {
  if (width > kPrefetched) return;
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < width; i += kLine) __builtin_prefetch(row + i, 1);
}

}  // namespace

template <typename I>
Groups GroupsOf(const I* ids, int64_t count) {
  // A hash table of numbers of groups, at most half full. -1: free.
  int bits = 4;
  while ((int64_t{1} << bits) < 2 * count) ++bits;
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  std::vector<int64_t> places(mask + 1, -1), firsts, group(count), sizes;
  for (int64_t i = 0; i < count; ++i) {
    uint64_t at = (static_cast<uint64_t>(ids[i]) * 0x9e3779b97f4a7c15u) >> (64 - bits);
    while (places[at] >= 0 && ids[firsts[places[at]]] != ids[i]) at = (at + 1) & mask;
    if (places[at] < 0) {
      places[at] = firsts.size();
      firsts.push_back(i);
      sizes.push_back(0);
    }
    group[i] = places[at];
    ++sizes[group[i]];
  }
  Groups groups = {std::vector<int64_t>(count), std::vector<int64_t>(sizes.size())};
  std::vector<int64_t> next(sizes.size());
  int64_t end = 0;
  for (size_t j = 0; j < sizes.size(); ++j) {
    next[j] = end;
    groups.ends[j] = end += sizes[j];
  }
  for (int64_t i = 0; i < count; ++i) groups.order[next[group[i]]++] = i;
  return groups;
}

template <typename T>
void SumRows(const Groups& groups, int64_t width, const T* slices, int64_t start,
             int64_t count, T* sums) {
  for (int64_t j = start; j < start + count; ++j) {
    T* sum = sums + j * width;
    int64_t i = j ? groups.ends[j - 1] : 0;
    std::copy_n(slices + groups.order[i] * width, width, sum);
    for (++i; i < groups.ends[j]; ++i) {
      const T* slice = slices + groups.order[i] * width;
      for (int64_t k = 0; k < width; ++k) sum[k] += slice[k];
    }
  }
}

template <typename T, typename W, typename I>
void StepRows(const Numbers<T>& numbers, const Part<T, W, T>& first, const Ticks& ticks,
              const I* ids, int64_t start, int64_t count) {
  const int64_t width = first.size;
  // The power that stands for many products, as exp, which is faster than pow.
  const double log_rho = std::log(static_cast<double>(numbers.rho));
  for (int64_t i = start; i < start + count; ++i) {
    if (i + kAhead < start + count) {
      const int64_t next = ids[i + kAhead] * width;
      Prefetch(ticks.last + ids[i + kAhead], 1);
      Prefetch(first.weights + next, width);
      Prefetch(first.velocity + next, width);
      if (first.momentum) Prefetch(first.momentum + next, width);
      if (first.average_gradient) Prefetch(first.average_gradient + next, width);
    }
    Part<T, W, T> row = From(first, ids[i] * width, width);
    row.gradient = first.gradient + i * width;
    const int32_t silence = ticks.updates - ticks.last[ids[i]];
    if (silence != 0) {
      const T factor = static_cast<T>(std::exp(silence * log_rho));
      Multiply(factor, width, row.velocity);
      if (row.average_gradient) Multiply(factor, width, row.average_gradient);
    }
    Step(numbers, row);
    ticks.last[ids[i]] = ticks.updates + 1;
  }
}

template <typename T, typename W, typename I>
Sums FollowRows(const FollowedRows<T, W>& rows, const I* ids, int64_t start,
                int64_t count, T forgetting, T weight) {
  const auto [run, pitch, stride] = rows.sample;
  const double log_forgetting = std::log(static_cast<double>(forgetting));
  Sums sums;
  for (int64_t i = start; i < start + count; ++i) {
    if (i + kAhead < start + count && ids[i + kAhead] % rows.row_step == 0) {
      const int64_t next = ids[i + kAhead] / rows.row_step * rows.looked_at;
      Prefetch(rows.weights + ids[i + kAhead] * rows.width, rows.width);
      Prefetch(rows.first_weights + next, rows.looked_at);
      Prefetch(rows.gradient_sums + next, rows.looked_at);
      Prefetch(rows.last + ids[i + kAhead], 1);
    }
    if (ids[i] % rows.row_step != 0) continue;
    const T* __restrict g = rows.gradient + i * rows.width;
    const W* __restrict w = rows.weights + ids[i] * rows.width;
    const int64_t place = ids[i] / rows.row_step * rows.looked_at;
    const T* __restrict first = rows.first_weights + place;
    T* __restrict s = rows.gradient_sums + place;
    const int32_t silence = rows.updates - rows.last[ids[i]];
    const T faded = static_cast<T>(std::exp(silence * log_forgetting));
    for (int64_t k = 0, begin = 0; k < rows.looked_at; begin += pitch) {
      for (int64_t end = k + run, at = begin; k < end; ++k, at += stride) {
        const T old = forgetting * (faded * s[k]);
        s[k] = old + weight * g[at];
        sums.gain += double(g[at]) * double(first[k] - static_cast<T>(w[at]));
        sums.length += std::abs(double(s[k])) - std::abs(double(old));
      }
    }
  }
  return sums;
}

template <typename T, typename I>
void AverageRows(const T* weights, T* average, int64_t width, const double* shares,
                 bool one_for_all, const I* ids, int64_t start, int64_t count) {
  for (int64_t i = start; i < start + count; ++i) {
    if (i + kAhead < start + count) {
      Prefetch(weights + ids[i + kAhead] * width, width);
      Prefetch(average + ids[i + kAhead] * width, width);
    }
    const double share = shares[one_for_all ? 0 : i];
    const T old = static_cast<T>(share), rest = static_cast<T>(1 - share);
    const T* __restrict w = weights + ids[i] * width;
    T* __restrict row = average + ids[i] * width;
    for (int64_t k = 0; k < width; ++k) row[k] = old * row[k] + rest * w[k];
  }
}

#define INSTANTIATE_AVERAGE(T)                                                       \
  template void AverageRows(const T*, T*, int64_t, const double*, bool,              \
                            const int32_t*, int64_t, int64_t);                       \
  template void AverageRows(const T*, T*, int64_t, const double*, bool,              \
                            const int64_t*, int64_t, int64_t);
INSTANTIATE_AVERAGE(float)
INSTANTIATE_AVERAGE(double)

#define INSTANTIATE(T, W)                                                            \
  template void StepRows(const Numbers<T>&, const Part<T, W, T>&, const Ticks&,      \
                         const int32_t*, int64_t, int64_t);                          \
  template void StepRows(const Numbers<T>&, const Part<T, W, T>&, const Ticks&,      \
                         const int64_t*, int64_t, int64_t);                          \
  template Sums FollowRows(const FollowedRows<T, W>&, const int32_t*, int64_t,       \
                           int64_t, T, T);                                           \
  template Sums FollowRows(const FollowedRows<T, W>&, const int64_t*, int64_t,       \
                           int64_t, T, T);
template Groups GroupsOf(const int32_t*, int64_t);
template Groups GroupsOf(const int64_t*, int64_t);
template void SumRows(const Groups&, int64_t, const float*, int64_t, int64_t, float*);
template void SumRows(const Groups&, int64_t, const double*, int64_t, int64_t, double*);
INSTANTIATE(float, float)
INSTANTIATE(float, Bfloat16)
INSTANTIATE(float, Half)
INSTANTIATE(double, double)
INSTANTIATE(double, float)

}  // namespace keras_rmsprop
