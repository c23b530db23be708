// The arithmetic of a step on some rows of a table, on plain pointers; see ../sparse.py.
// It knows nothing of TensorFlow.

#ifndef KERAS_RMSPROP_ROWS_H_
#define KERAS_RMSPROP_ROWS_H_

#include <cstdint>
#include <vector>

#include "search.h"
#include "step.h"

namespace keras_rmsprop {

// Which slices of a sparse gradient belong to the same row.
struct Groups {
  std::vector<int64_t> order;  // of the slices: those of a row together, as they came
  std::vector<int64_t> ends;   // where each row's end in it; rows as they first came
};

template <typename I>
Groups GroupsOf(const I* ids, int64_t count);

// Sums up the slices of some rows, each of `width` elements: from row `start` on.
template <typename T>
void SumRows(const Groups& groups, int64_t width, const T* slices, int64_t start,
             int64_t count, T* sums);

// The clock of a table.
struct Ticks {
  int32_t updates;  // of the table so far, without this one
  int32_t* last;    // for each row, the update up to which it is up to date
};

// Brings the slots of some rows up to date, takes their step, and ticks.
//
// `first` is the first row of the table and of the gradients. `ids` are the numbers of
// the rows that have a gradient. This is done for `count` of them from `start` on. T and
// W are as in `Step`, and slots are T.
template <typename T, typename W, typename I>
void StepRows(const Numbers<T>& numbers, const Part<T, W, T>& first, const Ticks& ticks,
              const I* ids, int64_t start, int64_t count);

// A table in the search, of which a step updates some rows.
template <typename T, typename W>
struct FollowedRows {
  Sample sample;  // of the elements of a row
  int64_t width, looked_at;  // elements of a row, and how many of them are looked at
  int64_t row_step;          // one in so many rows is looked at
  const T* gradient;         // of these rows
  const W* weights;          // of the table
  const T* first_weights;    // of the elements that are looked at
  T* gradient_sums;          // likewise: s
  const int32_t* last;       // for each row, the update up to which s is up to date
  int32_t updates;           // of the table so far
};

// Does for rows with a gradient what `Follow` does: for `count` of those in `ids`, from
// `start` on. Their s fades for the updates that they missed. `length` is by how much the
// sum of |s| is larger than if all s had faded only.
template <typename T, typename W, typename I>
Sums FollowRows(const FollowedRows<T, W>& rows, const I* ids, int64_t start,
                int64_t count, T forgetting, T weight);

// Lets the moving average of some rows follow their weights: avg <- m avg + (1 - m) w.
//
// `weights` and `average` are those of the table. `shares` is m, one for each of the
// rows in `ids`, or one for all. This is done for `count` of them from `start` on.
template <typename T, typename I>
void AverageRows(const T* weights, T* average, int64_t width, const double* shares,
                 bool one_for_all, const I* ids, int64_t start, int64_t count);

}  // namespace keras_rmsprop

#endif  // KERAS_RMSPROP_ROWS_H_
