// The element types that kernels compute with, on the device and (so that tests can run the same code) on the host.
#pragma once
#include <cstdint>
#include <cstring>

#include "traces/widen.hpp"

#ifdef __CUDACC__
#define KVREPLAY_BOTH __host__ __device__
#else
#define KVREPLAY_BOTH
#endif

namespace kvreplay::cuda {

struct F16 {
  std::uint16_t bits = 0;
};
struct Bf16 {
  std::uint16_t bits = 0;
};

template <class T>
inline constexpr ElementType kElement = ElementType::f32;
template <>
inline constexpr ElementType kElement<F16> = ElementType::f16;
template <>
inline constexpr ElementType kElement<Bf16> = ElementType::bf16;

KVREPLAY_BOTH inline std::uint32_t bits_of(float x) {
  std::uint32_t bits = 0;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

KVREPLAY_BOTH inline float float_of(std::uint32_t bits) {
  float x = 0;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// What the device does in one instruction, in integers: see the test against every one of the 65536 values.
KVREPLAY_BOTH inline float widen_f16(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000U) << 16;
  const std::uint32_t exponent = (half >> 10) & 0x1FU, mantissa = half & 0x3FFU;
  if (exponent == 0) {  // zero and subnormal: mantissa * 2^-24, exact in float32
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24F;
    return float_of(bits_of(magnitude) | sign);
  }
  const std::uint32_t biased = exponent == 0x1FU ? 0xFFU : exponent + 112;  // 112 = 127 - 15
  return float_of(sign | (biased << 23) | (mantissa << 13));
}

KVREPLAY_BOTH inline std::uint16_t narrow_f16(float x) {
  const std::uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000U, magnitude = bits & 0x7FFFFFFFU;
  if (magnitude > 0x7F800000U) {
    return static_cast<std::uint16_t>(sign | 0x7E00U);
  }
  if (magnitude >= 0x477FF000U) {  // 65520 and above round to infinity
    return static_cast<std::uint16_t>(sign | 0x7C00U);
  }
  if (magnitude < 0x38800000U) {  // below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    const float shifted = float_of(magnitude) + 0.5F;
    return static_cast<std::uint16_t>(sign | (bits_of(shifted) - 0x3F000000U));
  }
  const std::uint32_t rounded = magnitude + 0xFFFU + ((magnitude >> 13) & 1U);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000U) >> 13));
}

KVREPLAY_BOTH inline float to_float(float x) { return x; }

KVREPLAY_BOTH inline float to_float(Bf16 x) { return float_of(static_cast<std::uint32_t>(x.bits) << 16); }

KVREPLAY_BOTH inline float to_float(F16 x) {
#ifdef __CUDA_ARCH__
  float wide = 0;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  return widen_f16(x.bits);
#endif
}

// Rounds to nearest, ties to even; what is too large becomes infinite.
template <class T>
KVREPLAY_BOTH inline T from_float(float x) = delete;

template <>
KVREPLAY_BOTH inline float from_float<float>(float x) {
  return x;
}

template <>
KVREPLAY_BOTH inline Bf16 from_float<Bf16>(float x) {
  const std::uint32_t bits = bits_of(x);
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) {
    return {static_cast<std::uint16_t>((bits >> 16) | 0x40U)};
  }
  return {static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16)};
}

template <>
KVREPLAY_BOTH inline F16 from_float<F16>(float x) {
#ifdef __CUDA_ARCH__
  F16 narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
  return narrow;
#else
  return {narrow_f16(x)};
#endif
}

// x as a T that the file's element type holds too, so that attention sees just what is stored. What the file cannot
// hold is left as it is, and refused by the recorder.
template <class T>
KVREPLAY_BOTH inline T round_to(ElementType stored, float x) {
  const T value = from_float<T>(x);
  if (stored == kElement<T> || stored == ElementType::f32) {
    return value;
  }
  const float wide = to_float(value);
  const T rounded =
      from_float<T>(stored == ElementType::f16 ? to_float(from_float<F16>(wide)) : to_float(from_float<Bf16>(wide)));
  const bool finite = (bits_of(to_float(rounded)) & 0x7F800000U) != 0x7F800000U;
  return finite ? rounded : value;
}

// One 16-byte access.
struct alignas(16) Words {
  std::uint32_t word[4];
};
struct alignas(16) Float4 {
  float x[4];
};

// Eight neighbours as they lie in memory, and widened.
template <class T>
struct Eight {
  Words words[sizeof(T) / 2];
};

// p is a multiple of 16 bytes.
template <class T>
KVREPLAY_BOTH inline Eight<T> load_eight(const T* p) {
  Eight<T> eight;
  for (unsigned i = 0; i < sizeof(T) / 2; ++i) {
    eight.words[i] = reinterpret_cast<const Words*>(p)[i];
  }
  return eight;
}

KVREPLAY_BOTH inline void widen_eight(const Eight<float>& eight, float (&out)[8]) {
  for (int i = 0; i < 8; ++i) {
    out[i] = float_of(eight.words[i / 4].word[i % 4]);
  }
}

template <class T>
KVREPLAY_BOTH inline void widen_eight(const Eight<T>& eight, float (&out)[8]) {
  static_assert(sizeof(T) == 2);
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t two = eight.words[0].word[i];
    out[2 * i] = to_float(T{static_cast<std::uint16_t>(two & 0xFFFFU)});
    out[2 * i + 1] = to_float(T{static_cast<std::uint16_t>(two >> 16)});
  }
}

}  // namespace kvreplay::cuda
