// The kernel's ops for TensorFlow, of rows of one table.

#include <algorithm>
#include <vector>

#include "ops.h"
#include "rows.h"
#include "search.h"

namespace keras_rmsprop {

REGISTER_OP("KerasRmspropRows")
    .Doc("One step of RMSprop, of some rows of a table; see sparse.py.")
    .Input("gradient: T")
    .Input("ids: I")  // distinct
    .Input("weights: resource")
    .Input("velocity: resource")
    .Input("updates: resource")
    .Input("last: resource")
    .Input("momenta: M * resource")
    .Input("average_gradients: A * resource")
    .Input("learning_rate: T")
    .Input("correction: T")
    .Input("scale: T")
    .Input("constants: double")
    .Input("decays: double")
    .Attr("M: int >= 0")
    .Attr("A: int >= 0")
    .Attr("T: {float, double}")
    .Attr("W: {float, double, bfloat16, half}")
    .Attr("I: {int32, int64}")
    .Attr("epsilon_inside_sqrt: bool")
    .Attr("nesterov: bool")
    .Attr("lr_in_momentum: bool")
    .Attr("decoupled_weight_decay: bool")
    .SetIsStateful()
    .SetShapeFn(tf::shape_inference::NoOutputs);

REGISTER_OP("KerasRmspropDistinct")
    .Doc("The sums of the slices of each row, and the rows, as they first come.")
    .Input("slices: T")
    .Input("ids: I")
    .Output("sums: T")
    .Output("distinct: I")
    .Attr("T: {float, double}")
    .Attr("I: {int32, int64}")
    .SetShapeFn([](tf::shape_inference::InferenceContext* c) {
      tf::shape_inference::ShapeHandle sums;
      TF_RETURN_IF_ERROR(c->ReplaceDim(c->input(0), 0, c->UnknownDim(), &sums));
      c->set_output(0, sums);
      c->set_output(1, c->Vector(c->Dim(sums, 0)));
      return absl::OkStatus();
    });

REGISTER_OP("KerasRmspropFollowRows")
    .Doc("As KerasRmspropFollow, from the rows of a table that a step updates.")
    .Input("gradient: T")
    .Input("ids: I")  // distinct
    .Input("weights: resource")
    .Input("first_weights: resource")
    .Input("gradient_sums: resource")
    .Input("updates: resource")
    .Input("last: resource")
    .Input("forgetting: T")
    .Input("weight: T")
    .Output("gain: double")
    .Output("length: double")  // by how much more than if no row had a gradient
    .Attr("T: {float, double}")
    .Attr("W: {float, double, bfloat16, half}")
    .Attr("I: {int32, int64}")
    .Attr("sample: list(int)")  // run, pitch and stride in a row
    .Attr("row_step: int >= 1")
    .SetIsStateful()
    .SetShapeFn([](tf::shape_inference::InferenceContext* c) {
      c->set_output(0, c->Scalar());
      c->set_output(1, c->Scalar());
      return absl::OkStatus();
    });

REGISTER_OP("KerasRmspropAverageRows")
    .Doc("The EMA of some rows of a table follows their weights; see row_averages.py.")
    .Input("ids: I")         // distinct
    .Input("shares: double")  // that stay of the EMA: one for each row, or for all
    .Input("weights: resource")
    .Input("average: resource")
    .Attr("T: {float, double}")
    .Attr("I: {int32, int64}")
    .SetIsStateful()
    .SetShapeFn(tf::shape_inference::NoOutputs);

namespace {

constexpr int64_t kCyclesARow = 400;  // more, as it is not in a cache

// How many rows one thread does at a time.
int64_t RowsEach(int64_t width) {
  return std::max<int64_t>(1, kPieceElements / (width + 1));
}

// Checks that these are indices of rows of a table.
template <typename I>
absl::Status CheckIds(const tf::Tensor& ids, int64_t rows) {
  const I* id = ids.flat<I>().data();
  const int64_t count = ids.NumElements();
  if (std::all_of(id, id + count, [&](I i) { return 0 <= i && i < rows; })) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("An index of a sparse gradient is not in [0, ", rows, ")"));
}

// Checks that the first of these variables is a table of this dtype, with rows of the
// gradient's shape; returns the table's shape.
absl::Status CheckTable(Variables* variables, tf::DataType dtype,
                        const tf::Tensor& gradient, tf::TensorShape* shape) {
  TF_RETURN_IF_ERROR(variables->Check(0, 0, dtype, nullptr));
  const tf::Tensor& table = *variables->Get(0, 0);
  *shape = gradient.shape();
  if (table.dims() >= 1) shape->set_dim(0, table.dim_size(0));
  return variables->Check(0, 0, dtype, shape);
}

template <typename T, typename W, typename I>
class RowsOp : public UpdateOp<T> {
 public:
  using UpdateOp<T>::UpdateOp;

  void Compute(tf::OpKernelContext* ctx) override {
    const tf::Tensor *gradient, *ids;
    OP_REQUIRES_OK(ctx, ctx->input("gradient", &gradient));
    OP_REQUIRES_OK(ctx, ctx->input("ids", &ids));
    OP_REQUIRES(ctx,
                ids->dims() == 1 && gradient->dims() >= 1 &&
                    gradient->dim_size(0) == ids->NumElements(),
                absl::InvalidArgumentError("There must be a row for each index."));
    Variables variables;
    OP_REQUIRES_OK(ctx, variables.Find(ctx, 1,
                                       {"weights", "velocity", "updates", "last",
                                        "momenta", "average_gradients"},
                                       kMomenta));
    Request request;
    const tf::Tensor* decays;
    OP_REQUIRES_OK(ctx, this->Read(ctx, 1, &request, &decays));
    const Numbers<T> numbers(request);

    // Everything is checked before anything is written.
    OP_REQUIRES_OK(ctx, variables.Lock());
    tf::TensorShape shape;
    OP_REQUIRES_OK(
        ctx, CheckTable(&variables, tf::DataTypeToEnum<W>::v(), *gradient, &shape));
    const tf::TensorShape scalar, of_last({shape.dim_size(0)});
    for (int kind = 0; kind < kKinds; ++kind) {
      if (kind == kWeights || !variables.Has(kind)) continue;
      const bool ticks = kind == kUpdates || kind == kLast;
      OP_REQUIRES_OK(
          ctx, variables.Check(
                   kind, 0, ticks ? tf::DT_INT32 : tf::DataTypeToEnum<T>::v(),
                   kind == kUpdates ? &scalar : kind == kLast ? &of_last : &shape));
    }
    OP_REQUIRES_OK(ctx, CheckIds<I>(*ids, shape.dim_size(0)));
    const I* id = ids->flat<I>().data();
    const int64_t count = ids->NumElements();
    OP_REQUIRES_OK(ctx, variables.MakeSoleOwnerOfAll(ctx));
    int32_t* updates = variables.Data<int32_t>(kUpdates, 0);
    const int64_t width = count ? gradient->NumElements() / count : 0;
    const Part<T, Plain<W>, T> row = {
        width,
        gradient->flat<T>().data(),
        reinterpret_cast<Plain<W>*>(variables.Data<W>(kWeights, 0)),
        variables.Data<T>(kVelocity, 0),
        variables.Data<T>(kMomenta, 0),
        variables.Data<T>(kAverageGradients, 0),
        this->DecayOf(request, *decays, 0),
        nullptr,
        nullptr,
    };
    const Ticks ticks = {*updates, variables.Data<int32_t>(kLast, 0)};
    ForEach(
        ctx, PiecesOf({count}, RowsEach(width)),
        [&](int64_t, const Piece& piece) {
          StepRows(numbers, row, ticks, id, piece.start, piece.size);
        },
        kCyclesAnElement * width + kCyclesARow);
    ++*updates;
  }

 private:
  enum { kWeights, kVelocity, kUpdates, kLast, kMomenta, kAverageGradients, kKinds };
};

template <typename T, typename I>
class DistinctOp : public tf::OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(tf::OpKernelContext* ctx) override {
    const tf::Tensor *slices, *ids;
    OP_REQUIRES_OK(ctx, ctx->input("slices", &slices));
    OP_REQUIRES_OK(ctx, ctx->input("ids", &ids));
    OP_REQUIRES(ctx,
                ids->dims() == 1 && slices->dims() >= 1 &&
                    slices->dim_size(0) == ids->NumElements(),
                absl::InvalidArgumentError("There must be a slice for each index."));
    const I* id = ids->flat<I>().data();
    const int64_t count = ids->NumElements();
    const Groups groups = GroupsOf(id, count);
    const int64_t rows = groups.ends.size();
    tf::TensorShape shape = slices->shape();
    shape.set_dim(0, rows);
    tf::Tensor *sums, *distinct;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, shape, &sums));
    OP_REQUIRES_OK(ctx, ctx->allocate_output(1, {rows}, &distinct));
    for (int64_t j = 0; j < rows; ++j) {
      distinct->flat<I>()(j) = id[groups.order[j ? groups.ends[j - 1] : 0]];
    }
    const int64_t width = count ? slices->NumElements() / count : 0;
    const T* from = slices->flat<T>().data();
    T* to = sums->flat<T>().data();
    ForEach(
        ctx, PiecesOf({rows}, RowsEach(width)),
        [&](int64_t, const Piece& piece) {
          SumRows(groups, width, from, piece.start, piece.size, to);
        },
        width + 1);
  }
};

template <typename T, typename W, typename I>
class FollowRowsOp : public tf::OpKernel {
 public:
  explicit FollowRowsOp(tf::OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("sample", &sample_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("row_step", &row_step_));
  }

  void Compute(tf::OpKernelContext* ctx) override {
    const tf::Tensor *gradient, *ids, *forgetting, *weight;
    OP_REQUIRES_OK(ctx, ctx->input("gradient", &gradient));
    OP_REQUIRES_OK(ctx, ctx->input("ids", &ids));
    OP_REQUIRES_OK(ctx, ReadScalar(ctx, "forgetting", &forgetting));
    OP_REQUIRES_OK(ctx, ReadScalar(ctx, "weight", &weight));
    OP_REQUIRES(ctx,
                ids->dims() == 1 && gradient->dims() >= 1 &&
                    gradient->dim_size(0) == ids->NumElements() && sample_.size() == 3,
                absl::InvalidArgumentError("There must be a row for each index."));
    Variables variables;
    OP_REQUIRES_OK(
        ctx, variables.Find(
                 ctx, 1,
                 {"weights", "first_weights", "gradient_sums", "updates", "last"},
                 kKinds));
    tf::Tensor *gain, *length;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, {}, &gain));
    OP_REQUIRES_OK(ctx, ctx->allocate_output(1, {}, &length));

    OP_REQUIRES_OK(ctx, variables.Lock());
    const tf::DataType dtype = tf::DataTypeToEnum<T>::v();
    tf::TensorShape shape;
    OP_REQUIRES_OK(
        ctx, CheckTable(&variables, tf::DataTypeToEnum<W>::v(), *gradient, &shape));
    const int64_t rows = shape.dim_size(0);
    const tf::TensorShape scalar, of_last({rows});
    OP_REQUIRES_OK(ctx, variables.Check(kUpdates, 0, tf::DT_INT32, &scalar));
    OP_REQUIRES_OK(ctx, variables.Check(kLast, 0, tf::DT_INT32, &of_last));
    for (int kind : {kFirst, kSums}) {
      OP_REQUIRES_OK(ctx, variables.Check(kind, 0, dtype, nullptr));
    }
    OP_REQUIRES_OK(ctx, CheckIds<I>(*ids, rows));
    const int64_t count = ids->NumElements();
    const int64_t width = count ? gradient->NumElements() / count : 0;
    const int64_t seen = (rows + row_step_ - 1) / row_step_;  // rows looked at
    const int64_t kept = variables.Get(kSums, 0)->NumElements();
    const Sample sample = {sample_[0], sample_[1], sample_[2]};
    const int64_t looked_at = seen ? kept / seen : 0;
    OP_REQUIRES(ctx,
                looked_at * seen == kept &&
                    variables.Get(kFirst, 0)->NumElements() == kept &&
                    (count == 0 || Fits(sample, looked_at, width)),
                absl::InvalidArgumentError(
                    "The table has not the elements that are looked at."));
    OP_REQUIRES_OK(ctx, variables.MakeSoleOwner(ctx, kSums, 0));
    const FollowedRows<T, Plain<W>> followed = {
        sample,
        width,
        looked_at,
        row_step_,
        gradient->flat<T>().data(),
        reinterpret_cast<Plain<W>*>(variables.Data<W>(kWeights, 0)),
        variables.Data<T>(kFirst, 0),
        variables.Data<T>(kSums, 0),
        variables.Data<int32_t>(kLast, 0),
        *variables.Data<int32_t>(kUpdates, 0),
    };
    const std::vector<Piece> pieces = PiecesOf({count}, RowsEach(width));
    std::vector<Sums> of_pieces(pieces.size());
    ForEach(
        ctx, pieces,
        [&](int64_t i, const Piece& piece) {
          of_pieces[i] = FollowRows(followed, ids->flat<I>().data(), piece.start,
                                    piece.size, forgetting->flat<T>()(0),
                                    weight->flat<T>()(0));
        },
        kCyclesAnElement * looked_at + kCyclesARow);
    Sums sums;
    for (const Sums& of_piece : of_pieces) {
      sums.Add(of_piece, 1);
    }
    gain->scalar<double>()() = sums.gain;
    length->scalar<double>()() = sums.length;
  }

 private:
  enum { kWeights, kFirst, kSums, kUpdates, kLast, kKinds };

  std::vector<int64_t> sample_;
  int64_t row_step_;
};

template <typename T, typename I>
class AverageRowsOp : public tf::OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(tf::OpKernelContext* ctx) override {
    const tf::Tensor *ids, *shares;
    OP_REQUIRES_OK(ctx, ctx->input("ids", &ids));
    OP_REQUIRES_OK(ctx, ctx->input("shares", &shares));
    const int64_t count = ids->NumElements();
    const bool one_for_all = shares->dims() == 0;
    OP_REQUIRES(ctx, one_for_all || shares->NumElements() == count,
                absl::InvalidArgumentError("There must be a share for each index."));
    Variables variables;
    OP_REQUIRES_OK(ctx, variables.Find(ctx, 1, {"weights", "average"}, 2));

    OP_REQUIRES_OK(ctx, variables.Lock());
    const tf::DataType dtype = tf::DataTypeToEnum<T>::v();
    OP_REQUIRES_OK(ctx, variables.Check(kWeights, 0, dtype, nullptr));
    const tf::TensorShape& shape = variables.Get(kWeights, 0)->shape();
    OP_REQUIRES_OK(ctx, variables.Check(kAverage, 0, dtype, &shape));
    OP_REQUIRES(ctx, shape.dims() >= 1,
                absl::InvalidArgumentError("A table must have rows."));
    const int64_t rows = shape.dim_size(0);
    OP_REQUIRES_OK(ctx, CheckIds<I>(*ids, rows));
    OP_REQUIRES_OK(ctx, variables.MakeSoleOwner(ctx, kAverage, 0));
    const int64_t width = rows ? shape.num_elements() / rows : 0;
    ForEach(
        ctx, PiecesOf({count}, RowsEach(width)),
        [&](int64_t, const Piece& piece) {
          AverageRows(variables.Data<T>(kWeights, 0), variables.Data<T>(kAverage, 0),
                      width, shares->flat<double>().data(), one_for_all,
                      ids->flat<I>().data(), piece.start, piece.size);
        },
        kCyclesAnElement * width + kCyclesARow);
  }

 private:
  enum { kWeights, kAverage };
};

#define REGISTER_ROWS(T, W, I)                        \
  REGISTER_KERNEL_BUILDER(Name("KerasRmspropRows")    \
                              .Device(tf::DEVICE_CPU) \
                              .TypeConstraint<T>("T") \
                              .TypeConstraint<W>("W") \
                              .TypeConstraint<I>("I"), \
                          RowsOp<T, W, I>)
#define REGISTER_ROWS_OF(T, W)  \
  REGISTER_ROWS(T, W, int32_t); \
  REGISTER_ROWS(T, W, int64_t)
REGISTER_ROWS_OF(float, float);
REGISTER_ROWS_OF(float, tf::bfloat16);
REGISTER_ROWS_OF(float, Eigen::half);
REGISTER_ROWS_OF(double, double);
REGISTER_ROWS_OF(double, float);

#define REGISTER_FOLLOW_ROWS(T, W, I)                    \
  REGISTER_KERNEL_BUILDER(Name("KerasRmspropFollowRows") \
                              .Device(tf::DEVICE_CPU)    \
                              .TypeConstraint<T>("T")    \
                              .TypeConstraint<W>("W")    \
                              .TypeConstraint<I>("I"),   \
                          FollowRowsOp<T, W, I>)
#define REGISTER_FOLLOW_ROWS_OF(T, W)  \
  REGISTER_FOLLOW_ROWS(T, W, int32_t); \
  REGISTER_FOLLOW_ROWS(T, W, int64_t)
REGISTER_FOLLOW_ROWS_OF(float, float);
REGISTER_FOLLOW_ROWS_OF(float, tf::bfloat16);
REGISTER_FOLLOW_ROWS_OF(float, Eigen::half);
REGISTER_FOLLOW_ROWS_OF(double, double);
REGISTER_FOLLOW_ROWS_OF(double, float);

#define REGISTER_AVERAGE_ROWS(T, I)                       \
  REGISTER_KERNEL_BUILDER(Name("KerasRmspropAverageRows") \
                              .Device(tf::DEVICE_CPU)     \
                              .TypeConstraint<T>("T")     \
                              .TypeConstraint<I>("I"),    \
                          AverageRowsOp<T, I>)
REGISTER_AVERAGE_ROWS(float, int32_t);
REGISTER_AVERAGE_ROWS(float, int64_t);
REGISTER_AVERAGE_ROWS(double, int32_t);
REGISTER_AVERAGE_ROWS(double, int64_t);

#define REGISTER_DISTINCT(T, I)                        \
  REGISTER_KERNEL_BUILDER(Name("KerasRmspropDistinct") \
                              .Device(tf::DEVICE_CPU)  \
                              .TypeConstraint<T>("T")  \
                              .TypeConstraint<I>("I"), \
                          DistinctOp<T, I>)
REGISTER_DISTINCT(float, int32_t);
REGISTER_DISTINCT(float, int64_t);
REGISTER_DISTINCT(double, int32_t);
REGISTER_DISTINCT(double, int64_t);

}  // namespace
}  // namespace keras_rmsprop
