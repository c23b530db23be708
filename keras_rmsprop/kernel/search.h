// The arithmetic of the search for a learning rate, on plain pointers; see
// ../estimate.py. It knows nothing of TensorFlow.

#ifndef KERAS_RMSPROP_SEARCH_H_
#define KERAS_RMSPROP_SEARCH_H_

#include <cmath>
#include <cstdint>
#include <vector>

#include "step.h"

namespace keras_rmsprop {

// Which elements of a variable are looked at: they come in runs. In memory the elements
// of a run are `stride` apart, and the runs begin `pitch` apart.
struct Sample {
  int64_t run, pitch, stride;
};

// A variable in the search.
template <typename T, typename W>
struct Followed {
  Sample sample;
  int64_t looked_at, elements;  // how many are looked at, of how many
  const T* gradient;
  const W* weights;
  T* first_weights;   // of the elements that are looked at
  T* gradient_sums;   // likewise: s
  const T* momentum;  // of all elements; null: there is none
};

// See `estimate.Sums`.
struct Sums {
  double gain = 0;    // of <g, x0 - x>
  double length = 0;  // of |s|
  double ahead = 0;   // of g m
  double both = 0;    // of |g m|

  // Adds sums in which each element stands for so many.
  void Add(const Sums& sums, double stands_for) {
    gain += stands_for * sums.gain;
    length += stands_for * sums.length;
    ahead += stands_for * sums.ahead;
    both += stands_for * sums.both;
  }
};

// What is known so far: `estimate.Estimate`.
struct Estimate {
  float distance, gain, steps, path, reach, longest, back, brake;
};

// How to search: `kernel/tensorflow.py` gives them in this order.
struct Search {
  double initial, coefficient, growth, forgetting, tiny, lasting, most, same;
  double back, fall, rise, turning;
};
constexpr int kSearchNumbers = sizeof(Search) / sizeof(double);

// What is known when a search begins again.
Estimate Again(const Search& search);

// Returns what a step multiplies its gradient by in s.
float WeightOf(const Estimate& old, const Search& search, float factor, float scale);

// Returns what is known after a step. `sign` is -1 if it goes up the gradient.
Estimate After(const Estimate& old, const Search& search, float factor, float weight,
               float sign, const Sums& sums);

// Lets s follow the gradient, s <- forgetting * s + weight * g, and returns the sums.
// It does so for `size` of the elements that are looked at. If the search begins, the
// weights are the first ones. T and W are as in `Step`.
template <typename T, typename W>
Sums Follow(const Followed<T, W>& part, int64_t start, int64_t size, T forgetting,
            T weight, bool begins);

// Returns how far the farthest weight, of those looked at, is from its first value.
template <typename T, typename W>
T Farthest(const Followed<T, W>& part);

// Whether the weights are others than those with which the last `fit` ended.
template <typename T, typename W>
bool AreOthers(const std::vector<Followed<T, W>>& parts, const Estimate& known,
               const Search& search) {
  if (known.reach < 0) return true;
  float farthest = 0;
  for (const auto& part : parts) {
    const float reach = Farthest(part);
    if (!(reach <= farthest)) farthest = reach;
    if (std::isnan(farthest)) return false;
  }
  return std::abs(farthest - known.reach) >
         static_cast<float>(search.same) * std::abs(known.reach);
}

// Whether `size` elements in whole runs are all among so many.
inline bool Fits(const Sample& sample, int64_t size, int64_t elements) {
  if (size == 0) return true;
  const auto [run, pitch, stride] = sample;
  if (run < 1 || pitch < 1 || stride < 1 || size % run) return false;
  return (size / run - 1) * pitch + (run - 1) * stride < elements;
}

// Does so for all elements of variables that are looked at. Returns the sums of all, in
// which each of these elements stands for several of its variable. `for_each` is that of
// `StepAll`.
template <typename T, typename W, typename ForEach>
Sums FollowAll(const std::vector<Followed<T, W>>& parts, T forgetting, T weight,
               bool begins, ForEach for_each) {
  std::vector<int64_t> sizes;
  for (const auto& part : parts) sizes.push_back(part.looked_at);
  const std::vector<Piece> pieces = PiecesOf(sizes);
  std::vector<Sums> of_pieces(pieces.size());
  for_each(pieces, [&](int64_t i, const Piece& piece) {
    of_pieces[i] = Follow(parts[piece.variable], piece.start, piece.size, forgetting,
                          weight, begins);
  });
  Sums sums;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const auto& part = parts[pieces[i].variable];
    sums.Add(of_pieces[i], static_cast<double>(part.elements) / part.looked_at);
  }
  return sums;
}

// The sum of ln |x| of numbers, where it is finite, and how many these are.
struct Logs {
  double total = 0;
  int64_t count = 0;
};

// Subnormal numbers count as 0.
template <typename T>
Logs LogsOf(const T* x, int64_t size);

}  // namespace keras_rmsprop

#endif  // KERAS_RMSPROP_SEARCH_H_
