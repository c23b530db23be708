// The arithmetic of the search for a learning rate, on plain pointers; see
// ../automatic.py. It knows nothing of TensorFlow.

#ifndef KERAS_RMSPROP_SEARCH_H_
#define KERAS_RMSPROP_SEARCH_H_

#include <cstdint>

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
  const T* gradient;
  const W* weights;
  T* first_weights;  // of the elements that are looked at
  T* gradient_sums;  // likewise: s
};

struct Sums {
  double gain = 0;    // of <g, x0 - x>
  double length = 0;  // of |s|
};

// Lets s follow the gradient, s <- forgetting * s + weight * g, and returns the sums.
// It does so for `size` of the elements that are looked at. If the search begins, the
// weights are the first ones. T and W are as in `Step`.
template <typename T, typename W>
Sums Follow(const Followed<T, W>& part, int64_t start, int64_t size, T forgetting,
            T weight, bool begins);

}  // namespace keras_rmsprop

#endif  // KERAS_RMSPROP_SEARCH_H_
