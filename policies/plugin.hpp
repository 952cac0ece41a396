// What a shared object exports so that `kvreplay run --plugin` finds its parts: docs/plugins.md.
//
//   KVREPLAY_PLUGIN(kvreplay::MyPolicy);    once, outside of any namespace; several parts are listed with commas
#pragma once
#include <cstdint>
#include <string_view>

#include "policies/moments.hpp"
#include "policies/part.hpp"

namespace kvreplay {

// Raised with every change after which a part compiled before would misbehave: of policy.hpp, part.hpp, params.hpp,
// moments.hpp or this file. Helpers of other headers are linked by name, and one that is gone is said when loading.
inline constexpr std::int32_t kPluginInterface = 2;

// Text made when compiling; long enough for what plugin_abi() says.
struct AbiText {
  char text[256] = {};
  std::size_t size = 0;

  constexpr AbiText& operator<<(std::string_view s) {
    for (const char c : s) {
      text[size++] = c;
    }
    return *this;
  }
  constexpr AbiText& operator<<(std::uint64_t x) {
    if (x >= 10) {
      *this << x / 10;
    }
    text[size++] = static_cast<char>('0' + x % 10);
    return *this;
  }
};

// What must be the same on both sides beside the interface: compiler and library conventions, how Eigen lays out and
// multiplies matrices, and sizes of what passes between them.
consteval AbiText plugin_abi() {
  AbiText abi;
  abi << "C++ ABI " << __GXX_ABI_VERSION;
#ifdef __GLIBCXX__
  abi << ", libstdc++ strings " << _GLIBCXX_USE_CXX11_ABI;
#ifdef _GLIBCXX_DEBUG
  abi << " debug";
#endif
#endif
  abi << ", Eigen " << EIGEN_WORLD_VERSION << "." << EIGEN_MAJOR_VERSION << "." << EIGEN_MINOR_VERSION << " aligned to "
      << EIGEN_MAX_ALIGN_BYTES << "/" << EIGEN_MAX_STATIC_ALIGN_BYTES << " for";
#if defined(EIGEN_VECTORIZE_AVX512)
  abi << " AVX512";
#elif defined(EIGEN_VECTORIZE_AVX2)
  abi << " AVX2";
#elif defined(EIGEN_VECTORIZE_AVX)
  abi << " AVX";
#elif defined(EIGEN_VECTORIZE_SSE4_2)
  abi << " SSE4.2";
#elif defined(EIGEN_VECTORIZE_SSE2)
  abi << " SSE2";
#elif defined(EIGEN_VECTORIZE_NEON)
  abi << " NEON";
#else
  abi << " no SIMD";
#endif
#ifdef EIGEN_VECTORIZE_FMA
  abi << " with FMA";
#endif
  std::uint64_t layout = 14695981039346656037U;  // FNV-1a over sizes
  for (const std::size_t size : {sizeof(PartInfo),
                                 sizeof(ParamInfo),
                                 sizeof(ParamValue),
                                 sizeof(Traits),
                                 sizeof(Needs),
                                 sizeof(SetShape),
                                 sizeof(TokenSpan),
                                 sizeof(Rotation),
                                 sizeof(View),
                                 sizeof(Cache),
                                 sizeof(Future::Horizon),
                                 sizeof(Allocator::Layers),
                                 sizeof(Allocator::Prompt),
                                 sizeof(Loss),
                                 sizeof(Estimate),
                                 sizeof(EvictedBlock),
                                 sizeof(PromptCut),
                                 sizeof(MomentNeeds),
                                 sizeof(MomentRows),
                                 sizeof(std::string),
                                 sizeof(MatF),
                                 sizeof(std::vector<int>)}) {
    layout = (layout ^ size) * 1099511628211U;
  }
  return abi << ", layout " << layout % 1000000;
}

// The first two members are read before anything else is trusted, and stay as they are in every interface.
struct PluginExports {
  std::int32_t interface;
  const char* abi;
  std::int32_t n_parts;
  const PartInfo* parts;
};

inline constexpr const char* kPluginSymbol = "kvreplay_plugin";  // a PluginExports

namespace detail {
inline constexpr AbiText kPluginAbi = plugin_abi();
template <class... Parts>
constexpr PartInfo kPluginParts[] = {describe<Parts>()...};
}  // namespace detail

}  // namespace kvreplay

#define KVREPLAY_PLUGIN(...)                                                                 \
  extern "C" [[gnu::visibility("default")]] const ::kvreplay::PluginExports kvreplay_plugin; \
  constinit const ::kvreplay::PluginExports kvreplay_plugin = {                              \
      ::kvreplay::kPluginInterface, ::kvreplay::detail::kPluginAbi.text,                     \
      static_cast<std::int32_t>(std::size(::kvreplay::detail::kPluginParts<__VA_ARGS__>)),   \
      ::kvreplay::detail::kPluginParts<__VA_ARGS__>}
