// truncated_svd: QR and one-sided Jacobi, one matrix per lane.
//
// The tall one of X and Xᵀ, M × N, is factored QR; Jacobi makes R's columns orthogonal, the rotations being gathered in V
// beneath R. Then the tall side's vectors are Q times R's normalised columns, the short side's are V, and σ is the columns'
// norm, freed of the drift in length that V's columns show.

#include "jacobi.h"
#include "tile.h"

namespace rmm {

struct SvdArgs {
  View x, u, s, vh;  // [B, m, k], [B, m, rank], [B, rank], [B, rank, k]
};

// Groups of as many matrices as there are lanes, from `begin` to before `end`.
RMM_DECLARE_KERNEL(void truncated_svd(const SvdArgs& args, int64_t begin, int64_t end))

namespace RMM_ISA {

template <class T>
void svd_groups(const SvdArgs& args, int64_t begin, int64_t end) {
  const View& x = args.x;
  const bool tall = x.size[1] >= x.size[2];
  const int64_t batch = x.size[0], rank = args.s.size[1];
  const int64_t m = tall ? x.size[1] : x.size[2], n = tall ? x.size[2] : x.size[1];
  const int64_t along_m = x.stride[tall ? 1 : 2], along_n = x.stride[tall ? 2 : 1];
  const Jacobi<T> jacobi(n);
  Scratch<T> scratch(m * n + 2 * n * n + 4 * n + m + n);
  Vec<T>*a = scratch.take(m * n), *core = scratch.take(2 * n * n);
  Vec<T>*tau = scratch.take(n), *diagonal = scratch.take(n), *norms = scratch.take(n), *kept = scratch.take(n);
  Vec<T>*left = scratch.take(m), *row = scratch.take(n);
  const Vec<T> zero{}, nan = zero / zero;

  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * kLanes<T>;
    const int lanes = batch - first < kLanes<T> ? static_cast<int>(batch - first) : kLanes<T>;
    char* const from = x.at(first);
    const int64_t size = element_size(x.dtype);
    if (along_m <= along_n) {
      for (int64_t c = 0; c < n; ++c) {
        load_tile<T>(x.dtype, from + c * along_n * size, x.stride[0], along_m, lanes, m, a + c * m);
      }
    } else {
      for (int64_t i = 0; i < m; ++i) {
        load_tile<T>(x.dtype, from + i * along_m * size, x.stride[0], along_n, lanes, n, row);
        for (int64_t c = 0; c < n; ++c) a[c * m + i] = row[c];
      }
    }
    Vec<T> largest{};
    Mask<T> finite = ~Mask<T>{};
    for (int64_t i = 0; i < m * n; ++i) {
      const Vec<T> magnitude = abs<T>(a[i]);
      finite &= magnitude <= Bits<T>::largest;
      largest = magnitude > largest ? magnitude : largest;
    }
    largest = select<T>(finite, largest, zero);
    const Scale<T> scale = scale_of<T>(largest);
    for (int64_t i = 0; i < m * n; ++i) a[i] = select<T>(finite, a[i], zero) * scale.up1 * scale.up2;

    householder<T>(a, m, n, tau, diagonal);
    for (int64_t c = 0; c < n; ++c) {
      for (int64_t i = 0; i < n; ++i) {
        core[c * 2 * n + i] = i < c ? a[c * m + i] : i == c ? diagonal[c] : zero;
        core[c * 2 * n + n + i] = splat<T>(i == c ? 1 : 0);
      }
    }
    jacobi(core, n, 2 * n, norms);
    orthonormalise<T>(core, n, 2 * n, rank, norms, kept);

    for (int64_t c = 0; c < rank; ++c) {
      for (int64_t i = 0; i < m; ++i) left[i] = i < n ? core[c * 2 * n + i] : zero;
      apply_q<T>(a, tau, m, n, left, 1);
      Vec<T>* const right = core + c * 2 * n + n;
      const Vec<T> drift = rsqrt<T>(dot<T>(right, right, n));
      const Vec<T> square = dot<T>(left, left, m);
      const Vec<T> sign = peak_sign<T>(tall ? left : right, tall ? m : n);
      for (int64_t i = 0; i < m; ++i) {
        left[i] = select<T>(finite, left[i] * (sign * (T(1.5) - T(0.5) * square)) + T(0), nan);
      }
      for (int64_t i = 0; i < n; ++i) right[i] = select<T>(finite, right[i] * (sign * drift) + T(0), nan);
      const Vec<T> norm = norms[c] > Bits<T>::tiny ? norms[c] * rsqrt<T>(norms[c]) : zero;
      const Vec<T> sigma = select<T>(finite, norm * drift * scale.down2 * scale.down1, nan);

      const View &u = tall ? args.u : args.vh, &v = tall ? args.vh : args.u;
      const int64_t u_rank = tall ? 2 : 1, u_long = tall ? 1 : 2;
      store_tile<T>(u.dtype, u.at(first) + c * u.stride[u_rank] * size, u.stride[0], u.stride[u_long], lanes, m, left);
      store_tile<T>(v.dtype, v.at(first) + c * v.stride[u_long] * size, v.stride[0], v.stride[u_rank], lanes, n, right);
      store_tile<T>(args.s.dtype, args.s.at(first, c), args.s.stride[0], 1, lanes, 1, &sigma);
    }
  }
}

void truncated_svd(const SvdArgs& args, int64_t begin, int64_t end) {
  args.x.dtype == Dtype::f64 ? svd_groups<double>(args, begin, end) : svd_groups<float>(args, begin, end);
}

}  // namespace RMM_ISA
}  // namespace rmm

#ifdef RMM_OPS
#include <tuple>

#include "../common/tensor.h"
#include "parallel.h"

namespace rmm {

std::tuple<Tensor, Tensor, Tensor> truncated_svd_op(Tensor x, int64_t rank) {
  const View in = view(x, 3, "x");
  const int64_t batch = in.size[0], m = in.size[1], k = in.size[2];
  check_same(rank >= 0 && rank <= m && rank <= k, "x [B, m, k] with rank up to min(m, k)");
  Tensor u = torch::stable::new_empty(x, {batch, m, rank});
  Tensor s = torch::stable::new_empty(x, {batch, rank}, accumulator(x));
  Tensor vh = torch::stable::new_empty(x, {batch, rank, k});
  if (rank > 0) {
    const SvdArgs args{in, view(u, 3, "u"), view(s, 2, "s"), view(vh, 3, "vh")};
    const auto kernel = RMM_KERNEL(truncated_svd);
    parallel_groups(batch, in.dtype, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
  return {u, s, vh};
}

STABLE_TORCH_LIBRARY_IMPL(rmm_kernels, CPU, m) {
  m.impl("truncated_svd", TORCH_BOX(&truncated_svd_op));
  m.impl("truncated_svd.cpu", TORCH_BOX(&truncated_svd_op));
}

}  // namespace rmm
#endif
