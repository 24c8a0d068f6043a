// What a kernel sees of a tensor: a pointer, a dtype, sizes and strides in elements. No torch header beneath.
#pragma once

#include <cstdint>

namespace rmm {

enum class Dtype { f32, f16, bf16, f64 };

constexpr int64_t element_size(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

struct View {
  char* data;
  Dtype dtype;
  int64_t size[3];
  int64_t stride[3];

  // The address of element (i, j, k).
  char* at(int64_t i, int64_t j = 0, int64_t k = 0) const {
    return data + (i * stride[0] + j * stride[1] + k * stride[2]) * element_size(dtype);
  }
};

// Task of each token, int32 or int64, any stride.
struct Ids {
  const char* data;
  bool wide;
  int64_t size;
  int64_t stride;

  int64_t operator[](int64_t t) const {
    return wide ? reinterpret_cast<const int64_t*>(data)[t * stride] : reinterpret_cast<const int32_t*>(data)[t * stride];
  }
};

}  // namespace rmm
