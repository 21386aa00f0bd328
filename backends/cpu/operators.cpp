// torch.ops.tahf4_cpu on tensors of the CPU: shapes, memory and parameter blocks for the kernels.
//
// What these functions do not take (dtypes, shapes, devices, a program or a set of instructions that is not known here)
// goes to the general function in operators.py, which says what is wrong or runs the reference.
//
// calls.py does the same in Python, and neither replaces the other. This file is compiled against one version of PyTorch,
// so that no wheel can bring it. A call from Python costs tens of microseconds more, as long as a small product takes.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>

#include "common.h"

using namespace tahf4;

namespace {

using at::IntArrayRef;
using at::ScalarType;
using at::Tensor;
using at::TensorList;
using Optional = std::optional<Tensor>;
using Packed = std::tuple<Tensor, Tensor>;
using Text = std::string_view;

int number_of(ScalarType dtype) {
  return dtype == at::kFloat ? kFloat32 : dtype == at::kBFloat16 ? kBFloat16 : dtype == at::kHalf ? kFloat16 : -1;
}

int threads() { return at::get_num_threads(); }

// What is not taken here. The empty set of keys leads past the CPU's own function, this one, to the general one.
template <class Function, class... Given>
auto general(Function*, const char* name, const Given&... given) {
  const auto found = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  return found.template typed<Function>().redispatch(c10::DispatchKeySet(), given...);
}

constexpr int kRefused = -1;

// The set of instructions that the environment allows now, or kRefused: switched off, or named wrongly.
int instructions() {
  const char* off = std::getenv("TAHF4_NO_CPP");
  if (off && *off && std::strcmp(off, "0")) return kRefused;
  const char* wanted = std::getenv("TAHF4_CPU_ISA");
  const int found = tahf4_instruction_sets() | 1 << kNone;
  for (int isa = kAmx; isa >= kNone; --isa)
    if ((found >> isa & 1) && (!wanted || !*wanted || !std::strcmp(wanted, kSetNames[isa]))) return isa;
  return kRefused;
}

#include "operands.inc"

// ---------------------------------------------------------------------------------------------------------------------
// Quantization.

Packed quantize(const Tensor& x, const Optional& multiplier, int64_t block, int64_t bits, int64_t span) {
  const int isa = instructions();
  if (isa == kRefused || !readable(x) || !x.dim() || !Units::fit(x.size(-1), multiplier, block, bits, span))
    return general(quantize, "tahf4_cpu::quantize", x, multiplier, block, bits, span);
  const Units units(x.sizes(), multiplier, block, bits, span);
  if (!units.empty()) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor rows = rows_of(x);
    const int64_t k = x.size(-1);
    tahf4_quantize(rows.const_data_ptr(), number_of(x.scalar_type()), x.numel() / k, k,
                   rows.is_contiguous() ? k : rows.stride(0), &units.target, isa, threads());
  }
  return {units.codes, units.scales};
}

Packed fused_quantize(TensorList given, Text text, const Optional& multiplier, int64_t block, int64_t bits,
                      int64_t span) {
  const int isa = instructions();
  int64_t axes = 0;
  for (const Tensor& x : given) axes = std::max(axes, x.dim());
  at::DimVector shape(axes, 1);
  for (const Tensor& x : given)
    for (int64_t axis = 0; axis < x.dim(); ++axis)
      if (x.size(axis) != 1) shape[axes - x.dim() + axis] = x.size(axis);
  Known known;
  Broadcast described;
  if (isa <= kNone || !axes || !find(text, false, &known) || !known.fits(given, shape) ||
      !described.describe(given, shape) ||
      !Units::fit(shape.back(), multiplier, block, bits, span))
    return general(fused_quantize, "tahf4_cpu::fused_quantize", given, text, multiplier, block, bits, span);
  const Units units(shape, multiplier, block, bits, span);
  if (!units.empty())
    tahf4_fused_quantize(known.program, &described.inputs, units.scales.numel() / units.scales.size(-1), shape.back(),
                         &units.target, isa, threads());
  return {units.codes, units.scales};
}

// ---------------------------------------------------------------------------------------------------------------------
// Products.

struct Product {
  Product(const Tensor& codes, const Tensor& scales, const Tensor& weight_codes, const Tensor& weight_scales,
          const Optional& bias, int64_t span)
      : tensors{codes, scales, weight_codes, weight_scales}, bias(bias), span(span) {}
  // Whether shapes, dtypes and devices fit each other.
  bool fits() const {
    for (int i = 0; i < 4; ++i) {
      const Tensor& x = tensors[i];
      const auto wanted = i >= 2 || bits() == 4 ? (i & 1 ? at::kInt : at::kByte) : (i & 1 ? at::kFloat : at::kChar);
      if (!x.is_cpu() || x.scalar_type() != wanted || !x.dim()) return false;
    }
    const auto& [codes, scales, weight_codes, weight_scales] = tensors;
    const int64_t units = scales.size(-1), axes = scales.dim();
    if (codes.dim() != axes || weight_codes.dim() != 2 || weight_scales.dim() != 2) return false;
    for (int64_t axis = 0; axis + 1 < axes; ++axis)
      if (codes.size(axis) != scales.size(axis)) return false;
    return shared_units(span, units, bits()) && codes.size(-1) == units * code_bytes(bits()) && weight_scales.size(1) == units &&
           weight_codes.size(1) == units * (kUnit / 2) && weight_codes.size(0) == weight_scales.size(0) &&
           (!bias || (bias->is_cpu() && bias->dim() == 1 && bias->size(0) == weight_codes.size(0)));
  }
  // Of the activation.
  int bits() const { return tensors[0].scalar_type() == at::kChar ? 8 : 4; }
  at::DimVector shape() const {
    at::DimVector found(tensors[1].sizes());
    found.back() = tensors[2].size(0);
    return found;
  }
  // `columns` from `first` on, rounded to `dtype`, to where `result` says.
  void run(int64_t first, int64_t columns, int dtype, const Result& result, int isa) {
    const int64_t units = tensors[1].size(-1), m = units ? tensors[1].numel() / units : 0;
    if (!m || !columns) return;
    for (Tensor& x : tensors) x = x.contiguous();
    bias = plain(bias);
    const Operands operands = {static_cast<const uint8_t*>(tensors[0].const_data_ptr()),
                               static_cast<const int32_t*>(tensors[1].const_data_ptr()),
                               tensors[2].const_data_ptr<uint8_t>() + first * units * (kUnit / 2),
                               tensors[3].const_data_ptr<int32_t>() + first * units,
                               bias ? pointer(bias) + first : nullptr,
                               m, columns, units, dtype, bits(), shared_units(span, units, bits())};
    tahf4_linear(&operands, &result, isa, threads());
  }
  std::array<Tensor, 4> tensors;
  Optional bias;
  int64_t span;
};

Tensor dequantized(const Tensor& codes, const Tensor& scales) {
  if (codes.scalar_type() == at::kChar)
    return codes.to(at::kFloat).unflatten(-1, {scales.size(-1), kUnit}).mul(scales.unsqueeze(-1)).flatten(-2);
  at::DimVector shape(scales.sizes());
  shape.back() *= kUnit;
  const Tensor out = at::empty(shape, at::kFloat), packed = codes.contiguous(), metadata = scales.contiguous();
  if (out.numel())
    tahf4_dequantize(packed.const_data_ptr<uint8_t>(), metadata.const_data_ptr<int32_t>(),
                     scales.numel() / scales.size(-1), scales.size(-1), out.mutable_data_ptr<float>(), threads());
  return out;
}

Tensor linear(const Tensor& codes, const Tensor& scales, const Tensor& weight_codes, const Tensor& weight_scales,
              const Optional& bias, ScalarType dtype, int64_t span) {
  const int isa = instructions();
  Product product(codes, scales, weight_codes, weight_scales, bias, span);
  if (isa == kRefused || !product.fits() || (isa == kNone && span != 1))
    return general(linear, "tahf4_cpu::linear", codes, scales, weight_codes, weight_scales, bias, dtype, span);
  const at::AutoDispatchBelowADInplaceOrView guard;
  const c10::impl::ExcludeDispatchKeyGuard exact(c10::autocast_dispatch_keyset);
  if (isa == kNone || !scales.size(-1)) {
    const Tensor y = at::linear(dequantized(codes, scales), dequantized(weight_codes, weight_scales));
    return (bias ? y.add(bias->to(at::kFloat)) : y).to(dtype);
  }
  const int written = number_of(dtype) < 0 ? kFloat32 : number_of(dtype);
  const Tensor out = at::empty(product.shape(), number_of(dtype) < 0 ? at::kFloat : dtype);
  const Inputs none = {};
  // Rounded once: writing does it.
  product.run(0, weight_codes.size(0), kFloat32, {nullptr, &none, out.mutable_data_ptr(), written, {}}, isa);
  return out.to(dtype);
}

std::vector<Tensor> fused_linear(const Tensor& codes, const Tensor& scales, const Tensor& weight_codes,
                                 const Tensor& weight_scales, const Optional& bias, ScalarType dtype, IntArrayRef sizes,
                                 TensorList given, Text text, ScalarType result_dtype, int64_t span) {
  const int isa = instructions(), rounded = number_of(dtype), written = number_of(result_dtype);
  Product product(codes, scales, weight_codes, weight_scales, bias, span);
  Known known;
  Broadcast described;
  int64_t columns = 0;
  for (const int64_t size : sizes)
    columns = size < 0 || size > INT_MAX || columns < 0 || columns > INT_MAX ? -1 : columns + size;
  if (isa <= kNone || rounded < 0 || !product.fits() || !scales.size(-1) || columns != weight_codes.size(0) ||
      (sizes.size() != 1 && !text.empty()) || !find(text, true, &known) ||
      written != (known.dtype < 0 ? rounded : known.dtype) || !known.fits(given, product.shape()) ||
      !described.describe(given, product.shape(), known.factors))
    return general(fused_linear, "tahf4_cpu::fused_linear", codes, scales, weight_codes, weight_scales, bias, dtype,
                   sizes, given, text, result_dtype, span);
  const at::AutoDispatchBelowADInplaceOrView guard;
  std::vector<Tensor> results;
  int64_t first = 0;
  for (const int64_t size : sizes) {
    at::DimVector shape = product.shape();
    shape.back() = size;
    results.push_back(at::empty(shape, result_dtype));
    product.run(first, size, known.program ? rounded : kFloat32,
                {known.program, &described.inputs, results.back().mutable_data_ptr(), written, {}}, isa);
    first += size;
  }
  return results;
}

Packed linear_quantize(const Tensor& codes, const Tensor& scales, const Tensor& weight_codes, const Tensor& weight_scales,
                       const Optional& bias, ScalarType dtype, TensorList given, Text text, const Optional& multiplier,
                       int64_t block, int64_t bits, int64_t span) {
  const int isa = instructions(), rounded = number_of(dtype);
  Product product(codes, scales, weight_codes, weight_scales, bias, units_of(span));
  Known known;
  Broadcast described;
  if (isa <= kNone || rounded < 0 || !product.fits() || !scales.size(-1) || !find(text, true, &known) ||
      !known.fits(given, product.shape()) || !described.describe(given, product.shape(), known.factors) ||
      !Units::fit(weight_codes.size(0), multiplier, block, bits, rounding_of(span) + 1))
    return general(linear_quantize, "tahf4_cpu::linear_quantize", codes, scales, weight_codes, weight_scales, bias,
                   dtype, given, text, multiplier, block, bits, span);
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Units units(product.shape(), multiplier, block, bits, rounding_of(span) + 1);
  product.run(0, weight_codes.size(0), rounded, {known.program, &described.inputs, nullptr, 0, units.target}, isa);
  return {units.codes, units.scales};
}

#include "attention_operator.inc"

// ---------------------------------------------------------------------------------------------------------------------
// Derivatives, which there are none of: the general function says so to who asks for one.

bool derivative_asked(const c10::IValue& argument) {
  const auto asked = [](const Tensor& x) {
    return (c10::GradMode::is_enabled() && x.requires_grad()) || (x.defined() && x._fw_grad(/*level=*/0).defined());
  };
  if (argument.isTensor()) return asked(argument.toTensor());
  if (!argument.isTensorList()) return false;
  const auto tensors = argument.toTensorVector();
  return std::any_of(tensors.begin(), tensors.end(), asked);
}

void refuse_derivatives(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  const bool asked = std::any_of(arguments.begin(), arguments.end(), derivative_asked);
  op.redispatchBoxed(asked ? c10::DispatchKeySet() : keys & c10::after_autograd_keyset, stack);
}

}  // namespace

extern "C" {

// Put the functions into the operators that operators.py defines.
void tahf4_register() {
  static torch::Library library(torch::Library::IMPL, "tahf4_cpu", c10::DispatchKey::CPU, __FILE__, __LINE__);
  static torch::Library autograd(torch::Library::IMPL, "tahf4_cpu", c10::DispatchKey::AutogradCPU, __FILE__, __LINE__);
  static std::once_flag once;
  std::call_once(once, [] {
    for (const char* name : {"quantize", "linear", "fused_quantize", "fused_linear", "linear_quantize", "attention",
                             "attention_lse", "attention_of_codes"})
      autograd.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_derivatives>());
    library.impl("quantize", TORCH_FN(quantize));
    library.impl("linear", TORCH_FN(linear));
    library.impl("fused_quantize", TORCH_FN(fused_quantize));
    library.impl("fused_linear", TORCH_FN(fused_linear));
    library.impl("linear_quantize", TORCH_FN(linear_quantize));
    library.impl("attention", TORCH_FN(attention));
    library.impl("attention_lse", TORCH_FN(attention_lse));
    library.impl("attention_of_codes", TORCH_FN(attention_of_codes));
  });
}

// Make a program known, which stays where it is. product: whether it follows one. dtype: of its result, or -1. inputs,
// used, factors: see Known. The first of a text stays.
void tahf4_add_program(const char* text, int product, const Program* program, int dtype, int inputs, int used,
                       int factors) {
  const std::unique_lock<std::shared_mutex> lock(programs_lock);
  programs().try_emplace(key_of(text, product), Known{program, dtype, inputs, used, factors});
}

}  // extern "C"
