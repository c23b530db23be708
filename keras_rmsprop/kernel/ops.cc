// TensorFlow's side of the kernel: its ops and its threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "rows.h"
#include "search.h"
#include "step.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/util/work_sharder.h"
#include "variables.h"

namespace keras_rmsprop {

REGISTER_OP("KerasRmspropStep")
    .Doc("One step of RMSprop, of all variables of one dtype.")
    .Input("gradients: N * T")
    .Input("weights: NW * resource")  // here and below: so many, or a group
    .Input("velocities: NV * resource")
    .Input("momenta: M * resource")
    .Input("average_gradients: A * resource")
    .Input("averages: E * resource")
    .Input("first_weights: F * resource")  // of a search for a learning rate; see
    .Input("gradient_sums: G * resource")  // estimate.py
    .Input("estimates: Q * resource")      // likewise: one, or no search
    .Input("counters: C * resource")  // goes up by 1: the step and its count are one
    .Input("rates: R * resource")     // if there is one, in place of `learning_rate`
    .Input("warmups: U * resource")   // the count at which that of the averages began
    .Input("learning_rate: T")        // in a search, the factor on it
    .Input("correction: T")           // with a counter, the op finds it
    .Input("scale: T")
    .Input("share: T")                // with a counter, at most
    .Input("draw: int32")
    .Input("constants: double")
    .Input("decays: double")
    .Input("search: double")          // see `Search`; empty: there is none
    .Attr("N: int >= 1")
    .Attr("NW: int >= 1")
    .Attr("NV: int >= 1")
    .Attr("M: int >= 0")
    .Attr("A: int >= 0")
    .Attr("E: int >= 0")
    .Attr("F: int >= 0")
    .Attr("G: int >= 0")
    .Attr("Q: int >= 0")
    .Attr("C: int >= 0")
    .Attr("R: int >= 0")
    .Attr("U: int >= 0")
    .Attr("T: {float, double}")
    .Attr("W: {float, double, bfloat16, half}")
    .Attr("S: {float, double, bfloat16, uint8}")
    .Attr("epsilon_inside_sqrt: bool")
    .Attr("nesterov: bool")
    .Attr("lr_in_momentum: bool")
    .Attr("decoupled_weight_decay: bool")
    .Attr("cautious: bool")
    .Attr("bias_correction: bool")
    .Attr("samples: list(int)")  // of a search: run, pitch and stride of each
    .SetIsStateful()
    .SetShapeFn(tf::shape_inference::NoOutputs);

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

REGISTER_OP("KerasRmspropScale")
    .Doc("What scales tensors so that their global norm is at most this; or NaN.")
    .Input("tensors: N * T")
    .Input("most: double")
    .Output("scale: T")
    .Attr("N: int >= 1")
    .Attr("T: {float, double}")
    .SetShapeFn(tf::shape_inference::ScalarShape);

REGISTER_OP("KerasRmspropFollow")
    .Doc("The sums by which the search for a learning rate goes; see estimate.py.")
    .Input("gradients: N * T")
    .Input("weights: NW * resource")  // here and below: so many, or a group
    .Input("first_weights: NF * resource")
    .Input("gradient_sums: NS * resource")
    .Input("forgetting: T")
    .Input("weight: T")
    .Input("begins: bool")
    .Output("gain: double")
    .Output("length: double")
    .Attr("N: int >= 1")
    .Attr("NW: int >= 1")
    .Attr("NF: int >= 1")
    .Attr("NS: int >= 1")
    .Attr("T: {float, double}")
    .Attr("W: {float, double, bfloat16, half}")
    .Attr("samples: list(int)")  // run, pitch and stride of each
    .SetIsStateful()
    .SetShapeFn([](tf::shape_inference::InferenceContext* c) {
      c->set_output(0, c->Scalar());
      c->set_output(1, c->Scalar());
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

REGISTER_OP("KerasRmspropLogs")
    .Doc("The sum of ln |x| of a tensor, where it is finite, and of how many x.")
    .Input("tensor: T")
    .Output("total: double")
    .Output("count: int64")
    .Attr("T: {float, double}")
    .SetShapeFn([](tf::shape_inference::InferenceContext* c) {
      c->set_output(0, c->Scalar());
      c->set_output(1, c->Scalar());
      return absl::OkStatus();
    });

REGISTER_OP("KerasRmspropAverageRows")
    .Doc("The EMA of some rows of a table follows their weights; see averages.py.")
    .Input("ids: I")         // distinct
    .Input("shares: double")  // that stay of the EMA: one for each row, or for all
    .Input("weights: resource")
    .Input("average: resource")
    .Attr("T: {float, double}")
    .Attr("I: {int32, int64}")
    .SetIsStateful()
    .SetShapeFn(tf::shape_inference::NoOutputs);

REGISTER_OP("KerasRmspropGroup")
    .Doc("Variables as one resource, which other ops need not look up.")
    .Input("variables: N * resource")
    .Output("group: resource")
    .Attr("N: int >= 1")
    .SetShapeFn(tf::shape_inference::ScalarShape);

namespace {

constexpr int64_t kCyclesAnElement = 1;
constexpr int64_t kCyclesAThread = 1 << 17;  // with fewer, to wake it takes longer
constexpr int64_t kCyclesARow = 400;  // more, as it is not in a cache

// How many rows one thread does at a time.
int64_t RowsEach(int64_t width) {
  return std::max<int64_t>(1, kPieceElements / (width + 1));
}

std::vector<int64_t> SizesOf(const tf::OpInputList& tensors) {
  std::vector<int64_t> sizes;
  for (const tf::Tensor& tensor : tensors) sizes.push_back(tensor.NumElements());
  return sizes;
}

// Does something for all pieces, on TensorFlow's own threads. Each takes those of its
// share, then what is left of others: nobody waits for a thread that wakes late. Shares
// are in one piece, as threads that write side by side take lines from each other.
template <typename Function>
void ForEach(tf::OpKernelContext* ctx, const std::vector<Piece>& pieces,
             const Function& function, int64_t cycles_each = kCyclesAnElement) {
  int64_t size = 0;
  for (const Piece& piece : pieces) size += piece.size;
  const auto* workers = ctx->device()->tensorflow_cpu_worker_threads();
  const int64_t wanted = std::min<int64_t>(
      {workers->num_threads, tf::GetPerThreadMaxParallelism(),
       cycles_each * size / kCyclesAThread});
  const int64_t threads = std::max<int64_t>(wanted, 1), count = pieces.size();
  struct Progress {
    explicit Progress(int64_t threads) : next(threads) {}
    std::vector<std::atomic<int64_t>> next;  // of each share
    std::atomic<int64_t> done{0};
  };
  const auto progress = std::make_shared<Progress>(threads);
  for (int64_t i = 0; i < threads; ++i) progress->next[i] = count * i / threads;
  const auto take = [&function, &pieces, progress, threads, count](int64_t first) {
    for (int64_t j = first; j < first + threads; ++j) {
      const int64_t share = j % threads, end = count * (share + 1) / threads;
      for (int64_t i; (i = progress->next[share]++) < end; ++progress->done) {
        function(i, pieces[i]);
      }
    }
  };
  for (int64_t i = 1; i < threads; ++i) {
    workers->workers->Schedule([take, i] { take(i); });
  }
  take(0);
  while (progress->done < count) std::this_thread::yield();
}

// The arithmetic has types of its own for 16 bits and for pieces, with the same bits.
template <typename W>
using Plain = std::conditional_t<
    std::is_same_v<W, tf::bfloat16>, Bfloat16,
    std::conditional_t<std::is_same_v<W, Eigen::half>, Half,
                       std::conditional_t<std::is_same_v<W, uint8_t>, Coded, W>>>;

absl::Status ReadScalar(tf::OpKernelContext* ctx, const char* name,
                        const tf::Tensor** scalar) {
  TF_RETURN_IF_ERROR(ctx->input(name, scalar));
  if ((*scalar)->NumElements() != 1) {
    return absl::InvalidArgumentError(absl::StrCat(name, " must be a scalar."));
  }
  return absl::OkStatus();
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

// Reads a variable with a number, if there is one. It is not locked together with the
// others, which an op elsewhere may hold that waits for this one.
absl::Status ReadNumber(tf::OpKernelContext* ctx, const char* name,
                        std::optional<double>* number) {
  tf::OpInputList handles;
  TF_RETURN_IF_ERROR(ctx->input_list(name, &handles));
  if (handles.size() == 0) return absl::OkStatus();
  Variables variables;
  TF_RETURN_IF_ERROR(variables.Find(ctx, 1, {name}, 0));
  TF_RETURN_IF_ERROR(variables.Lock());
  const tf::DataType dtype = variables.Get(0, 0)->dtype();
  const tf::TensorShape scalar;
  TF_RETURN_IF_ERROR(variables.Check(0, 0, dtype, &scalar));
  switch (dtype) {
    case tf::DT_FLOAT:
      *number = *variables.Data<float>(0, 0);
      return absl::OkStatus();
    case tf::DT_DOUBLE:
      *number = *variables.Data<double>(0, 0);
      return absl::OkStatus();
    case tf::DT_INT32:
      *number = *variables.Data<int32_t>(0, 0);
      return absl::OkStatus();
    default:
      return absl::InvalidArgumentError(absl::StrCat(name, " has a wrong dtype."));
  }
}


// The variables of a search for a learning rate: the kinds of weights, first weights and
// s among them, and the sample of each, three numbers.
struct Searched {
  Variables& variables;
  int weights, first, sums;
  const std::vector<int64_t>& samples;

  // Checks what is kept of a variable, and says which elements are looked at.
  template <typename T, typename W>
  absl::Status Check(int i, const tf::Tensor& gradient, Followed<T, W>* part) const {
    for (int kind : {first, sums}) {
      TF_RETURN_IF_ERROR(
          variables.Check(kind, i, tf::DataTypeToEnum<T>::v(), nullptr));
    }
    part->sample = {samples[3 * i], samples[3 * i + 1], samples[3 * i + 2]};
    part->looked_at = variables.Get(sums, i)->NumElements();
    part->elements = gradient.NumElements();
    if (part->looked_at == variables.Get(first, i)->NumElements() &&
        Fits(part->sample, part->looked_at, part->elements)) {
      return absl::OkStatus();
    }
    return absl::InvalidArgumentError(
        absl::StrCat("Gradient ", i, " has not the elements that are looked at."));
  }

  // Sets the pointers, once the step is the sole owner of the buffers. W is
  // TensorFlow's type of the weights.
  template <typename W, typename T>
  void Find(int i, const tf::Tensor& gradient, Followed<T, Plain<W>>* part) const {
    part->gradient = gradient.flat<T>().data();
    part->weights = reinterpret_cast<Plain<W>*>(variables.Data<W>(weights, i));
    part->first_weights = variables.Data<T>(first, i);
    part->gradient_sums = variables.Data<T>(sums, i);
  }
};

// What the ops have in common that take a step: its numbers.
template <typename T>
class UpdateOp : public tf::OpKernel {
 public:
  explicit UpdateOp(tf::OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("epsilon_inside_sqrt", &epsilon_inside_sqrt_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("nesterov", &nesterov_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("lr_in_momentum", &lr_in_momentum_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("decoupled_weight_decay", &decoupled_));
  }

 protected:
  // Reads what is asked for, and the weight decay of each variable.
  absl::Status Read(tf::OpKernelContext* ctx, int count, Request* request,
                    const tf::Tensor** decays) {
    const tf::Tensor *rate, *correction, *scale, *constants;
    TF_RETURN_IF_ERROR(ReadScalar(ctx, "learning_rate", &rate));
    TF_RETURN_IF_ERROR(ReadScalar(ctx, "correction", &correction));
    TF_RETURN_IF_ERROR(ReadScalar(ctx, "scale", &scale));
    TF_RETURN_IF_ERROR(ctx->input("constants", &constants));
    TF_RETURN_IF_ERROR(ctx->input("decays", decays));
    if (constants->NumElements() != 3 ||
        ((*decays)->NumElements() != 0 && (*decays)->NumElements() != count)) {
      return absl::InvalidArgumentError(
          "There must be three constants, and a decay for each gradient or none.");
    }
    const auto constant = constants->flat<double>();
    *request = {};
    request->scale = scale->flat<T>()(0);
    request->learning_rate = rate->flat<T>()(0);
    request->rho = constant(0);
    request->momentum = constant(1);
    request->epsilon = constant(2);
    request->correction = correction->flat<T>()(0);
    request->epsilon_inside_sqrt = epsilon_inside_sqrt_;
    request->nesterov = nesterov_;
    request->lr_in_momentum = lr_in_momentum_;
    request->decoupled_weight_decay = decoupled_;
    return absl::OkStatus();
  }

  // Returns the weight decay of a variable.
  static Decay<T> DecayOf(const Request& request, const tf::Tensor& decays, int i) {
    return {request, decays.NumElements() ? decays.flat<double>()(i) : 0};
  }

 private:
  bool epsilon_inside_sqrt_, nesterov_, lr_in_momentum_, decoupled_;
};

template <typename T, typename W, typename S>
class StepOp : public UpdateOp<T> {
 public:
  explicit StepOp(tf::OpKernelConstruction* ctx) : UpdateOp<T>(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("cautious", &cautious_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("bias_correction", &bias_correction_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("samples", &samples_));
  }

  void Compute(tf::OpKernelContext* ctx) override {
    tf::OpInputList gradients;
    OP_REQUIRES_OK(ctx, ctx->input_list("gradients", &gradients));
    const int count = gradients.size();
    Variables variables, own;
    OP_REQUIRES_OK(ctx, own.Find(ctx, 1, {"counters", "estimates"}, 0));
    OP_REQUIRES_OK(ctx, variables.Find(ctx, count,
                                       {"weights", "velocities", "momenta",
                                        "average_gradients", "averages",
                                        "first_weights", "gradient_sums"},
                                       2));
    std::optional<double> rate, warmup;
    OP_REQUIRES_OK(ctx, ReadNumber(ctx, "rates", &rate));
    OP_REQUIRES_OK(ctx, ReadNumber(ctx, "warmups", &warmup));
    Request request;
    const tf::Tensor* decays;
    OP_REQUIRES_OK(ctx, this->Read(ctx, count, &request, &decays));
    request.learning_rate = rate.value_or(request.learning_rate);
    const tf::Tensor* share;
    OP_REQUIRES_OK(ctx, ReadScalar(ctx, "share", &share));
    request.share = share->flat<T>()(0);
    const tf::Tensor* draw;
    OP_REQUIRES_OK(ctx, ReadScalar(ctx, "draw", &draw));
    request.draw = static_cast<uint32_t>(draw->flat<int32_t>()(0));
    request.cautious = cautious_ && variables.Has(kMomenta);
    OP_REQUIRES(ctx, !variables.Has(kAverages) || (std::is_same_v<T, W>),
                absl::InvalidArgumentError("Averages need weights in full precision."));
    const bool searches = own.Has(kEstimate);
    const tf::Tensor* search;
    OP_REQUIRES_OK(ctx, ctx->input("search", &search));
    OP_REQUIRES(ctx,
                variables.Has(kFirst) == searches && variables.Has(kSums) == searches &&
                    search->NumElements() == (searches ? kSearchNumbers : 0) &&
                    samples_.size() == (searches ? 3 * static_cast<size_t>(count) : 0),
                absl::InvalidArgumentError("All of a search must be there, or nothing."));

    // Everything is checked before anything is written.
    OP_REQUIRES_OK(ctx, variables.Lock());
    OP_REQUIRES_OK(ctx, own.Lock());
    const tf::TensorShape scalar, of_estimate({sizeof(Estimate) / sizeof(float)});
    if (own.Has(kCounter)) {
      OP_REQUIRES_OK(ctx, own.Check(kCounter, 0, tf::DT_INT64, &scalar));
      ReadCount(*own.Data<int64_t>(kCounter, 0), warmup, &request);
    }
    if (searches) {
      OP_REQUIRES_OK(ctx, own.Check(kEstimate, 0, tf::DT_FLOAT, &of_estimate));
    }
    const tf::DataType of_weights = tf::DataTypeToEnum<W>::v();
    const tf::DataType of_slots = tf::DataTypeToEnum<S>::v();
    for (int kind = 0; kind < kKinds; ++kind) {
      const bool is_slot = kind != kWeights && kind != kAverages;
      for (int i = 0; variables.Has(kind) && i < count; ++i) {
        tf::TensorShape shape = gradients[i].shape();
        if (is_slot && std::is_same_v<S, uint8_t>) {
          shape = {(shape.num_elements() + kBlock - 1) / kBlock, sizeof(Coded)};
        }
        OP_REQUIRES_OK(
            ctx, variables.Check(kind, i, is_slot ? of_slots : of_weights, &shape));
      }
    }
    const Searched searched = {variables, kWeights, kFirst, kSums, samples_};
    std::vector<Followed<T, Plain<W>>> followed(searches ? count : 0);
    for (size_t i = 0; i < followed.size(); ++i) {
      OP_REQUIRES_OK(ctx, searched.Check(i, gradients[i], &followed[i]));
    }
    OP_REQUIRES_OK(ctx, own.MakeSoleOwnerOfAll(ctx));
    OP_REQUIRES_OK(ctx, variables.MakeSoleOwnerOfAll(ctx));
    if (searches) {
      for (int i = 0; i < count; ++i) {
        searched.Find<W>(i, gradients[i], &followed[i]);
      }
      Search how;
      std::memcpy(&how, search->flat<double>().data(), sizeof how);
      request.learning_rate = RateOf(ctx, how, request, followed, &variables,
                                     own.Data<float>(kEstimate, 0));
    }
    const Numbers<T> numbers(request);
    std::vector<Part<T, Plain<W>, Plain<S>>> parts(count);
    for (int i = 0; i < count; ++i) {
      parts[i] = {
          gradients[i].NumElements(),
          gradients[i].flat<T>().data(),
          reinterpret_cast<Plain<W>*>(variables.Data<W>(kWeights, i)),
          reinterpret_cast<Plain<S>*>(variables.Data<S>(kVelocities, i)),
          reinterpret_cast<Plain<S>*>(variables.Data<S>(kMomenta, i)),
          reinterpret_cast<Plain<S>*>(variables.Data<S>(kAverageGradients, i)),
          this->DecayOf(request, *decays, i),
          variables.Data<T>(kAverages, i),
          nullptr,
      };
    }
    std::vector<tf::Tensor> updates(request.cautious ? count : 0);
    for (size_t i = 0; i < updates.size(); ++i) {
      OP_REQUIRES_OK(ctx, ctx->allocate_temp(tf::DataTypeToEnum<T>::v(),
                                             gradients[i].shape(), &updates[i]));
      parts[i].update = updates[i].template flat<T>().data();
    }
    StepAll(numbers, parts, [&](const std::vector<Piece>& pieces, auto step) {
      ForEach(ctx, pieces, step);
    });
    if (own.Has(kCounter)) ++*own.Data<int64_t>(kCounter, 0);
  }

 private:
  enum { kWeights, kVelocities, kMomenta, kAverageGradients, kAverages, kKinds };
  enum { kFirst = kKinds, kSums };  // of a search
  enum { kCounter, kEstimate };     // of the optimizer's own

  // Finds what depends on how many steps there were; see `rule.correction` and
  // `averages.Momentum`.
  void ReadCount(int64_t count, std::optional<double> warmup, Request* request) const {
    if (bias_correction_) {
      const T log_rho = std::log(request->rho);
      request->correction = -std::expm1(static_cast<T>(count + 1) * log_rho);
    }
    if (warmup) {
      const T n = static_cast<T>(count) - static_cast<T>(*warmup);
      request->share = std::min((1 + n) / (10 + n), static_cast<T>(request->share));
    }
    if (count == 0) request->share = 0;
  }

  // Updates the estimate of a search, as `estimate.find` does; returns the rate.
  static float RateOf(tf::OpKernelContext* ctx, const Search& search,
                      const Request& request,
                      const std::vector<Followed<T, Plain<W>>>& parts,
                      Variables* variables, float* kept) {
    Estimate known;
    std::memcpy(&known, kept, sizeof known);
    if (known.reach != 0 && AreOthers(parts, known, search)) {
      known = Again(search);
      for (int i = 0; i < static_cast<int>(parts.size()); ++i) {
        std::fill_n(parts[i].gradient_sums, parts[i].looked_at, T(0));
        if (request.lr_in_momentum && variables->Has(kMomenta)) {
          const auto bytes = variables->Get(kMomenta, i)->tensor_data();
          std::fill_n(const_cast<char*>(bytes.data()), bytes.size(), 0);
        }
      }
    }
    const float factor = request.learning_rate, sign = request.scale < 0 ? -1 : 1;
    const float scale = sign * static_cast<float>(request.scale);
    const float weight = WeightOf(known, search, factor, scale);
    const Sums sums = FollowAll(parts, static_cast<T>(search.forgetting),
                                static_cast<T>(weight), known.steps == 0,
                                [&](const std::vector<Piece>& pieces, auto follow) {
                                  ForEach(ctx, pieces, follow);
                                });
    known = After(known, search, factor, weight, sign, sums);
    std::memcpy(kept, &known, sizeof known);
    return factor * known.distance * static_cast<float>(1 - request.momentum);
  }

  bool cautious_, bias_correction_;
  std::vector<int64_t> samples_;
};

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

template <typename T>
class ScaleOp : public tf::OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(tf::OpKernelContext* ctx) override {
    tf::OpInputList tensors;
    OP_REQUIRES_OK(ctx, ctx->input_list("tensors", &tensors));
    const tf::Tensor* given;
    OP_REQUIRES_OK(ctx, ReadScalar(ctx, "most", &given));
    tf::Tensor* scale;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, {}, &scale));
    std::vector<const T*> places;
    for (const tf::Tensor& x : tensors) places.push_back(x.flat<T>().data());
    const double norm = NormOfAll(places, SizesOf(tensors),
                                  [&](const std::vector<Piece>& pieces, auto sum) {
                                    ForEach(ctx, pieces, sum);
                                  });
    const double most = given->flat<double>()(0);
    // An infinite norm makes it NaN.
    scale->scalar<T>()() = static_cast<T>(most / std::max(norm, most) + (norm - norm));
  }
};

template <typename T, typename W>
class FollowOp : public tf::OpKernel {
 public:
  explicit FollowOp(tf::OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("samples", &samples_));
  }

  void Compute(tf::OpKernelContext* ctx) override {
    tf::OpInputList gradients;
    OP_REQUIRES_OK(ctx, ctx->input_list("gradients", &gradients));
    const int count = gradients.size();
    Variables variables;
    OP_REQUIRES_OK(
        ctx, variables.Find(ctx, count, {"weights", "first_weights", "gradient_sums"},
                            kKinds));
    const tf::Tensor *forgetting, *weight, *begins;
    OP_REQUIRES_OK(ctx, ctx->input("forgetting", &forgetting));
    OP_REQUIRES_OK(ctx, ctx->input("weight", &weight));
    OP_REQUIRES_OK(ctx, ctx->input("begins", &begins));
    OP_REQUIRES(ctx,
                forgetting->NumElements() == 1 && weight->NumElements() == 1 &&
                    begins->NumElements() == 1 &&
                    samples_.size() == 3 * static_cast<size_t>(count),
                absl::InvalidArgumentError("There must be a weight, and a sample for "
                                           "each gradient."));
    tf::Tensor *gain, *length;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, {}, &gain));
    OP_REQUIRES_OK(ctx, ctx->allocate_output(1, {}, &length));

    OP_REQUIRES_OK(ctx, variables.Lock());
    const Searched searched = {variables, kWeights, kFirst, kSums, samples_};
    std::vector<Followed<T, Plain<W>>> parts(count);
    for (int i = 0; i < count; ++i) {
      OP_REQUIRES_OK(ctx, variables.Check(kWeights, i, tf::DataTypeToEnum<W>::v(),
                                          &gradients[i].shape()));
      OP_REQUIRES_OK(ctx, searched.Check(i, gradients[i], &parts[i]));
    }
    const bool at_first = begins->flat<bool>()(0);
    for (int i = 0; i < count; ++i) {
      OP_REQUIRES_OK(ctx, variables.MakeSoleOwner(ctx, kSums, i));
      if (at_first) OP_REQUIRES_OK(ctx, variables.MakeSoleOwner(ctx, kFirst, i));
      searched.Find<W>(i, gradients[i], &parts[i]);
    }
    const Sums sums = FollowAll(
        parts, forgetting->flat<T>()(0), weight->flat<T>()(0), at_first,
        [&](const std::vector<Piece>& pieces, auto follow) {
          ForEach(ctx, pieces, follow);
        });
    gain->scalar<double>()() = sums.gain;
    length->scalar<double>()() = sums.length;
  }

 private:
  enum { kWeights, kFirst, kSums, kKinds };

  std::vector<int64_t> samples_;
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
      sums.gain += of_piece.gain;
      sums.length += of_piece.length;
    }
    gain->scalar<double>()() = sums.gain;
    length->scalar<double>()() = sums.length;
  }

 private:
  enum { kWeights, kFirst, kSums, kUpdates, kLast, kKinds };

  std::vector<int64_t> sample_;
  int64_t row_step_;
};

template <typename T>
class LogsOp : public tf::OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(tf::OpKernelContext* ctx) override {
    const tf::Tensor* tensor;
    OP_REQUIRES_OK(ctx, ctx->input("tensor", &tensor));
    tf::Tensor *total, *count;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, {}, &total));
    OP_REQUIRES_OK(ctx, ctx->allocate_output(1, {}, &count));
    const std::vector<Piece> pieces = PiecesOf({tensor->NumElements()});
    std::vector<Logs> of_pieces(pieces.size());
    ForEach(ctx, pieces, [&](int64_t i, const Piece& piece) {
      of_pieces[i] = LogsOf(tensor->flat<T>().data() + piece.start, piece.size);
    });
    Logs logs;
    for (const Logs& of_piece : of_pieces) {
      logs.total += of_piece.total;
      logs.count += of_piece.count;
    }
    total->scalar<double>()() = logs.total;
    count->scalar<int64_t>()() = logs.count;
  }
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

class GroupOp : public tf::OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(tf::OpKernelContext* ctx) override {
    tf::OpInputList handles;
    OP_REQUIRES_OK(ctx, ctx->input_list("variables", &handles));
    auto group = Group::Of(ctx, handles);
    OP_REQUIRES_OK(ctx, group.status());
    tf::Tensor* output;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, {}, &output));
    output->scalar<tf::ResourceHandle>()() = tf::ResourceHandle::MakeRefCountingHandle(
        group->release(), ctx->device()->name());
  }
};

#define REGISTER_FOLLOW(T, W)                         \
  REGISTER_KERNEL_BUILDER(Name("KerasRmspropFollow")  \
                              .Device(tf::DEVICE_CPU) \
                              .TypeConstraint<T>("T") \
                              .TypeConstraint<W>("W"), \
                          FollowOp<T, W>)
REGISTER_FOLLOW(float, float);
REGISTER_FOLLOW(float, tf::bfloat16);
REGISTER_FOLLOW(float, Eigen::half);
REGISTER_FOLLOW(double, double);
REGISTER_FOLLOW(double, float);

#define REGISTER_STEP(T, W, S)                        \
  REGISTER_KERNEL_BUILDER(Name("KerasRmspropStep")    \
                              .Device(tf::DEVICE_CPU) \
                              .TypeConstraint<T>("T") \
                              .TypeConstraint<W>("W") \
                              .TypeConstraint<S>("S"), \
                          StepOp<T, W, S>)
REGISTER_STEP(float, float, float);
REGISTER_STEP(float, tf::bfloat16, float);
REGISTER_STEP(float, Eigen::half, float);
REGISTER_STEP(double, double, double);
REGISTER_STEP(double, float, double);
REGISTER_STEP(float, float, tf::bfloat16);
REGISTER_STEP(float, tf::bfloat16, tf::bfloat16);
REGISTER_STEP(float, Eigen::half, tf::bfloat16);
REGISTER_STEP(float, float, uint8_t);
REGISTER_STEP(float, tf::bfloat16, uint8_t);
REGISTER_STEP(float, Eigen::half, uint8_t);

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

#define REGISTER_LOGS(T)                                                            \
  REGISTER_KERNEL_BUILDER(                                                          \
      Name("KerasRmspropLogs").Device(tf::DEVICE_CPU).TypeConstraint<T>("T"), LogsOp<T>)
REGISTER_LOGS(float);
REGISTER_LOGS(double);

#define REGISTER_SCALE(T)                                                         \
  REGISTER_KERNEL_BUILDER(                                                          \
      Name("KerasRmspropScale").Device(tf::DEVICE_CPU).TypeConstraint<T>("T"), \
      ScaleOp<T>)
REGISTER_SCALE(float);
REGISTER_SCALE(double);

REGISTER_KERNEL_BUILDER(Name("KerasRmspropGroup").Device(tf::DEVICE_CPU), GroupOp);

}  // namespace
}  // namespace keras_rmsprop
