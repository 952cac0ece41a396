#include "traces/widen.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__F16C__) && defined(__AVX2__)
#include <immintrin.h>
#endif

namespace kvreplay {
namespace {

static_assert(std::endian::native == std::endian::little, "a trace is little-endian and is read as it is");

std::uint16_t load16(const std::byte* in) {
  std::uint16_t bits;
  std::memcpy(&bits, in, sizeof(bits));
  return bits;
}

float widen_f16(std::uint16_t half) {
  const std::uint32_t sign = std::uint32_t{half & 0x8000U} << 16;
  const std::uint32_t magnitude = half & 0x7fffU;
  if (magnitude >= 0x7c00U) {  // infinite or NaN
    return std::bit_cast<float>(sign | 0x7f800000U | (magnitude & 0x3ffU) << 13);
  }
  if (magnitude >= 0x0400U) {  // normal: only the bias differs
    return std::bit_cast<float>(sign | ((magnitude << 13) + (std::uint32_t{127 - 15} << 23)));
  }
  const float tiny = static_cast<float>(magnitude) * 0x1p-24F;  // zero or subnormal, exact in float32
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(tiny));
}

std::uint16_t narrow_f16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 16 & 0x8000U;
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude > 0x7f800000U) {
    return static_cast<std::uint16_t>(sign | 0x7e00U);
  }
  if (magnitude >= 0x477ff000U) {  // 65520 and above round to infinity
    return static_cast<std::uint16_t>(sign | 0x7c00U);
  }
  if (magnitude < 0x38800000U) {  // below 2^-14: adding 0.5 lets the processor round to units of 2^-24
    const float shifted = std::bit_cast<float>(magnitude) + 0.5F;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3f000000U));
  }
  const std::uint32_t odd = magnitude >> 13 & 1U;
  const std::uint32_t rounded = magnitude + 0xfffU + odd - (std::uint32_t{127 - 15} << 23);
  return static_cast<std::uint16_t>(sign | rounded >> 13);
}

std::uint16_t narrow_bf16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffU) > 0x7f800000U) {
    return static_cast<std::uint16_t>(bits >> 16 | 0x40U);  // quiet, so that no NaN is cut to infinity
  }
  return static_cast<std::uint16_t>((bits + 0x7fffU + (bits >> 16 & 1U)) >> 16);
}

// Each returns whether all values are finite.

bool widen_all_f16(const std::byte* in, float* out, std::size_t n) {
  std::size_t i = 0;
  bool finite = true;
#if defined(__AVX512F__) && defined(__AVX512BW__)
  __m512i largest = _mm512_setzero_si512();
  const __m512i mask = _mm512_set1_epi16(0x7fff);
  for (; i + 32 <= n; i += 32) {
    const __m512i half = _mm512_loadu_si512(in + 2 * i);
    largest = _mm512_max_epu16(largest, _mm512_and_si512(half, mask));
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm512_castsi512_si256(half)));
    _mm512_storeu_ps(out + i + 16, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)));
  }
  finite = _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(0x7c00)) == 0;
#elif defined(__F16C__) && defined(__AVX2__)
  __m128i largest = _mm_setzero_si128();
  const __m128i mask = _mm_set1_epi16(0x7fff);
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 2 * i));
    largest = _mm_max_epu16(largest, _mm_and_si128(half, mask));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
  }
  alignas(16) std::uint16_t lanes[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(lanes), largest);
  finite = *std::max_element(lanes, lanes + 8) < 0x7c00U;
#endif
  for (; i < n; ++i) {
    const std::uint16_t half = load16(in + 2 * i);
    finite = finite && (half & 0x7fffU) < 0x7c00U;
    out[i] = widen_f16(half);
  }
  return finite;
}

bool widen_all_bf16(const std::byte* in, float* out, std::size_t n) {
  std::size_t i = 0;
  bool finite = true;
#if defined(__AVX512F__) && defined(__AVX512BW__)
  __m512i largest = _mm512_setzero_si512();
  const __m512i mask = _mm512_set1_epi16(0x7fff);
  for (; i + 32 <= n; i += 32) {
    const __m512i top = _mm512_loadu_si512(in + 2 * i);
    largest = _mm512_max_epu16(largest, _mm512_and_si512(top, mask));
    const __m512i low = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(top)), 16);
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(top, 1)), 16);
    _mm512_storeu_ps(out + i, _mm512_castsi512_ps(low));
    _mm512_storeu_ps(out + i + 16, _mm512_castsi512_ps(high));
  }
  finite = _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(0x7f80)) == 0;
#elif defined(__F16C__) && defined(__AVX2__)
  __m128i largest = _mm_setzero_si128();
  const __m128i mask = _mm_set1_epi16(0x7fff);
  for (; i + 8 <= n; i += 8) {
    const __m128i top = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 2 * i));
    largest = _mm_max_epu16(largest, _mm_and_si128(top, mask));
    _mm256_storeu_ps(out + i, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(top), 16)));
  }
  alignas(16) std::uint16_t lanes[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(lanes), largest);
  finite = *std::max_element(lanes, lanes + 8) < 0x7f80U;
#endif
  for (; i < n; ++i) {
    const std::uint16_t top = load16(in + 2 * i);
    finite = finite && (top & 0x7fffU) < 0x7f80U;
    out[i] = std::bit_cast<float>(std::uint32_t{top} << 16);
  }
  return finite;
}

bool copy_all_f32(const std::byte* in, float* out, std::size_t n) {
  if (n > 0 && static_cast<const void*>(in) != static_cast<const void*>(out)) {
    std::memcpy(out, in, n * sizeof(float));
  }
  std::uint32_t largest = 0;  // a plain reduction, which compilers vectorise
  for (std::size_t i = 0; i < n; ++i) {
    largest = std::max(largest, std::bit_cast<std::uint32_t>(out[i]) & 0x7fffffffU);
  }
  return largest < 0x7f800000U;
}

void narrow_all_f16(const float* in, std::byte* out, std::size_t n) {
  std::size_t i = 0;
#if defined(__F16C__) && defined(__AVX2__)
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * i), half);
  }
#endif
  for (; i < n; ++i) {
    const std::uint16_t half = narrow_f16(in[i]);
    std::memcpy(out + 2 * i, &half, sizeof(half));
  }
}

}  // namespace

std::string_view name_of(ElementType type) {
  switch (type) {
    case ElementType::f16:
      return "f16";
    case ElementType::bf16:
      return "bf16";
    case ElementType::f32:
      return "f32";
  }
  return "f32";
}

ElementType element_type_of(std::string_view name) {
  for (const ElementType type : {ElementType::f16, ElementType::bf16, ElementType::f32}) {
    if (name == name_of(type)) {
      return type;
    }
  }
  throw std::invalid_argument("dtype '" + std::string(name) + "' is unknown; allowed are f16, bf16 and f32");
}

bool widen(ElementType type, const std::byte* in, std::span<float> out) {
  switch (type) {
    case ElementType::f16:
      return widen_all_f16(in, out.data(), out.size());
    case ElementType::bf16:
      return widen_all_bf16(in, out.data(), out.size());
    case ElementType::f32:
      return copy_all_f32(in, out.data(), out.size());
  }
  return false;
}

void narrow(ElementType type, std::span<const float> in, std::byte* out) {
  switch (type) {
    case ElementType::f16:
      narrow_all_f16(in.data(), out, in.size());
      return;
    case ElementType::bf16:
      for (std::size_t i = 0; i < in.size(); ++i) {
        const std::uint16_t top = narrow_bf16(in[i]);
        std::memcpy(out + 2 * i, &top, sizeof(top));
      }
      return;
    case ElementType::f32:
      if (!in.empty()) {
        std::memcpy(out, in.data(), in.size_bytes());
      }
      return;
  }
}

}  // namespace kvreplay
