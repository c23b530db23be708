// The kernel's ops for TensorFlow, of whole variables.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "ops.h"
#include "search.h"
#include "step.h"

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
    .Input("momenta: M * resource")
    .Input("forgetting: T")
    .Input("weight: T")
    .Output("sums: double")  // four, see `estimate.Sums`
    .Attr("N: int >= 1")
    .Attr("NW: int >= 1")
    .Attr("NF: int >= 1")
    .Attr("NS: int >= 1")
    .Attr("M: int >= 0")
    .Attr("T: {float, double}")
    .Attr("W: {float, double, bfloat16, half}")
    .Attr("samples: list(int)")  // run, pitch and stride of each
    .SetIsStateful()
    .SetShapeFn([](tf::shape_inference::InferenceContext* c) {
      c->set_output(0, c->Vector(4));
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

REGISTER_OP("KerasRmspropGroup")
    .Doc("Variables as one resource, which other ops need not look up.")
    .Input("variables: N * resource")
    .Output("group: resource")
    .Attr("N: int >= 1")
    .SetShapeFn(tf::shape_inference::ScalarShape);

namespace {

std::vector<int64_t> SizesOf(const tf::OpInputList& tensors) {
  std::vector<int64_t> sizes;
  for (const tf::Tensor& tensor : tensors) sizes.push_back(tensor.NumElements());
  return sizes;
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

// The variables of a search for a learning rate: the kinds of weights, first weights, s
// and momentum buffers among them, and the sample of each, three numbers.
struct Searched {
  Variables& variables;
  int weights, first, sums, momenta;  // momenta < 0: they are not looked at
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
    part->momentum = momenta < 0 ? nullptr : variables.Data<T>(momenta, i);
  }
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
    const int turns = std::is_same_v<S, T> ? kMomenta : -1;
    const Searched searched = {variables, kWeights, kFirst, kSums, turns, samples_};
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
    const float rest = 1 - request.momentum;
    return factor * (known.brake * known.distance) * rest;
  }

  bool cautious_, bias_correction_;
  std::vector<int64_t> samples_;
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
        ctx, variables.Find(ctx, count,
                            {"weights", "first_weights", "gradient_sums", "momenta"},
                            kMomenta));
    const tf::Tensor *forgetting, *weight;
    OP_REQUIRES_OK(ctx, ctx->input("forgetting", &forgetting));
    OP_REQUIRES_OK(ctx, ctx->input("weight", &weight));
    OP_REQUIRES(ctx,
                forgetting->NumElements() == 1 && weight->NumElements() == 1 &&
                    samples_.size() == 3 * static_cast<size_t>(count),
                absl::InvalidArgumentError("There must be a weight, and a sample for "
                                           "each gradient."));
    tf::Tensor* output;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, {4}, &output));

    OP_REQUIRES_OK(ctx, variables.Lock());
    const Searched searched = {variables, kWeights, kFirst, kSums, kMomenta, samples_};
    std::vector<Followed<T, Plain<W>>> parts(count);
    for (int i = 0; i < count; ++i) {
      OP_REQUIRES_OK(ctx, variables.Check(kWeights, i, tf::DataTypeToEnum<W>::v(),
                                          &gradients[i].shape()));
      OP_REQUIRES_OK(ctx, searched.Check(i, gradients[i], &parts[i]));
      if (variables.Has(kMomenta)) {
        OP_REQUIRES_OK(ctx, variables.Check(kMomenta, i, tf::DataTypeToEnum<T>::v(),
                                            &gradients[i].shape()));
      }
    }
    for (int i = 0; i < count; ++i) {
      OP_REQUIRES_OK(ctx, variables.MakeSoleOwner(ctx, kSums, i));
      searched.Find<W>(i, gradients[i], &parts[i]);
    }
    const Sums sums = FollowAll(
        parts, forgetting->flat<T>()(0), weight->flat<T>()(0), false,
        [&](const std::vector<Piece>& pieces, auto follow) {
          ForEach(ctx, pieces, follow);
        });
    const double all[] = {sums.gain, sums.length, sums.ahead, sums.both};
    std::copy_n(all, 4, output->flat<double>().data());
  }

 private:
  enum { kWeights, kFirst, kSums, kMomenta };

  std::vector<int64_t> samples_;
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
