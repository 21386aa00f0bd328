// torch.ops.tahf4_cpu.attention on tensors of the CPU: shapes, memory and the parameter block for its kernel.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <limits>

#include "operators.h"

using namespace tahf4;

namespace {

constexpr double kLog2 = 0.6931471805599453;
constexpr int64_t kMostChannels = 1024;

// What a mask adds to the scores.
Tensor added(const Tensor& mask, IntArrayRef shape) {
  const Tensor values = mask.scalar_type() == at::kBool
                            ? at::zeros(mask.sizes(), at::kFloat).masked_fill(mask.logical_not(), -INFINITY)
                            : mask.to(at::kFloat);
  constexpr float kMost = std::numeric_limits<float>::max();
  const Tensor added = values.mul(1 / kLog2);
  // A row of the least number of its dtype, which stands for padding, is no row of minus infinity.
  return at::where(values.isfinite(), added.clamp(-kMost, kMost), added).expand(shape);
}

bool attention_fits(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& mask, bool causal, bool gqa) {
  for (const Tensor* x : {&q, &k, &v})
    if (!readable(*x) || x->dim() != 4 || x->scalar_type() != q.scalar_type()) return false;
  const int64_t batch = q.size(0), heads = q.size(1), shared = k.size(1);
  if (k.size(0) != batch || v.size(0) != batch || v.size(1) != shared || v.size(2) != k.size(2) ||
      k.size(3) != q.size(3) || q.size(3) < 1 || q.size(3) > kMostChannels ||
      (shared != heads && (!gqa || !shared || heads % shared)))
    return false;
  if (!mask) return true;
  const int64_t wanted[] = {batch, heads, q.size(2), k.size(2)}, missing = 4 - mask->dim();
  if (causal || missing < 0 || !mask->is_cpu() || (mask->scalar_type() != at::kBool && !readable(*mask))) return false;
  for (int64_t axis = 0; axis < mask->dim(); ++axis)
    if (mask->size(axis) != 1 && mask->size(axis) != wanted[missing + axis]) return false;
  return true;
}

}  // namespace

Tensor tahf4::attention(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& mask, bool causal,
                        std::optional<double> scale, bool gqa) {
  const int isa = instructions();
  if (isa == kRefused || !attention_fits(q, k, v, mask, causal, gqa))
    return general(tahf4::attention, "tahf4_cpu::attention", q, k, v, mask, causal, scale, gqa);
  const at::AutoDispatchBelowADInplaceOrView guard;
  const int64_t batch = q.size(0), heads = q.size(1), rows = q.size(2), keys = k.size(2), channels = v.size(3);
  const int64_t padded = (q.size(3) + kUnit - 1) / kUnit * kUnit;
  // As SDPA does.
  Tensor out = channels == q.size(3) ? at::empty_like(q, q.options().dtype(at::kFloat))
                                     : at::empty({batch, heads, rows, channels}, at::kFloat);
  if (!keys) out.zero_();
  if (out.numel() && keys) {
    Attention x = {};
    // Rows as they lie, where their channels are contiguous.
    const auto rows_in = [](const Tensor& given, int64_t* strides) {
      const Tensor found = given.stride(3) == 1 ? given : given.contiguous();
      for (int axis = 0; axis < 3; ++axis) strides[axis] = found.stride(axis);
      return found;
    };
    const Tensor left = rows_in(q, x.q_strides), right = rows_in(k, x.k_strides), held = rows_in(v, x.v_strides);
    x.q = left.const_data_ptr(), x.k = right.const_data_ptr(), x.v = held.const_data_ptr();
    x.out = out.mutable_data_ptr<float>();
    for (int axis = 0; axis < 4; ++axis) x.out_strides[axis] = out.stride(axis);
    x.batch = batch, x.heads = heads, x.key_heads = k.size(1), x.rows = rows, x.keys = keys;
    x.width = q.size(3), x.channels = channels, x.block = padded & -padded, x.units = padded / kUnit;
    x.norm = float(1.0 / std::sqrt(double(x.block)));
    x.factor = float((scale ? *scale : std::pow(double(x.width), -0.5)) / kLog2);
    x.dtype = number_of(q.scalar_type()), x.causal = causal;
    Tensor bias;
    if (mask) {
      bias = added(*mask, {batch, heads, rows, keys});
      x.mask = bias.const_data_ptr<float>();
      for (int axis = 0; axis < 4; ++axis) x.mask_strides[axis] = bias.stride(axis);
    }
    tahf4_attention(&x, isa, threads());
  }
  return out.to(q.scalar_type());
}
