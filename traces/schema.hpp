// The names, versions and limits of the trace format. They exist only here; docs/trace_format.md
// explains them.
#pragma once
#include <array>
#include <cstdint>
#include <string_view>

namespace kvreplay::schema {

inline constexpr const char* kFormat = "kvtrace";
inline constexpr const char* kVersion = "1.0";
inline constexpr int kMajor = 1, kMinor = 0;

// Groups and datasets.
inline constexpr const char* kModel = "model";
inline constexpr const char* kRope = "rope";  // below /model
inline constexpr const char* kTypes = "types";
inline constexpr const char* kBfloat16 = "bfloat16";  // below /types
inline constexpr const char* kTokens = "tokens";
inline constexpr const char* kId = "id";
inline constexpr const char* kPosition = "position";
inline constexpr const char* kPhase = "phase";
inline constexpr const char* kLogprob = "logprob";
inline constexpr const char* kPiece = "piece";
inline constexpr const char* kSpans = "spans";
inline constexpr const char* kName = "name";
inline constexpr const char* kBegin = "begin";
inline constexpr const char* kEnd = "end";
inline constexpr const char* kNValid = "n_valid";
inline constexpr const char* kLayers = "layers";
inline constexpr const char* kK = "k";
inline constexpr const char* kV = "v";
inline constexpr const char* kQ = "q";
inline constexpr const char* kQIndex = "q_index";
inline constexpr const char* kOut = "out";
inline constexpr const char* kOutIndex = "out_index";
inline constexpr const char* kWO = "w_o";
inline constexpr const char* kScores = "scores";

// Attributes of /.
inline constexpr const char* kFormatAttr = "format";
inline constexpr const char* kVersionAttr = "format_version";
inline constexpr const char* kUuid = "uuid";
inline constexpr const char* kCreatedUtc = "created_utc";
inline constexpr const char* kGenerator = "generator";
inline constexpr const char* kContentHash = "content_hash";
inline constexpr const char* kComplete = "complete";
inline constexpr const char* kProvenance = "provenance";
inline constexpr std::array kRootAttributes = {kFormatAttr, kVersionAttr, kUuid,     kCreatedUtc,
                                               kGenerator,  kContentHash, kComplete, kProvenance};

// Attributes of /model (its name is kName).
inline constexpr const char* kArchitecture = "architecture";
inline constexpr const char* kConfigJson = "config_json";
inline constexpr const char* kNLayers = "n_layers";
inline constexpr const char* kNHeads = "n_heads";
inline constexpr const char* kNKvHeads = "n_kv_heads";
inline constexpr const char* kHeadDim = "head_dim";
inline constexpr const char* kVHeadDim = "v_head_dim";
inline constexpr const char* kAttentionScale = "attention_scale";
inline constexpr const char* kQkNorm = "qk_norm";
inline constexpr const char* kLogitSoftcap = "logit_softcap";
inline constexpr const char* kDtype = "dtype";
inline constexpr const char* kWeightsHash = "weights_hash";
inline constexpr const char* kSlidingWindow = "sliding_window";
inline constexpr std::array kModelAttributes = {kName,     kArchitecture, kConfigJson,  kNLayers,        kNHeads,
                                                kNKvHeads, kHeadDim,      kVHeadDim,    kAttentionScale, kQkNorm,
                                                kDtype,    kLogitSoftcap, kWeightsHash, kSlidingWindow};

// Attributes of /model/rope.
inline constexpr const char* kStyle = "style";
inline constexpr const char* kStyleHalf = "half";
inline constexpr const char* kStyleInterleaved = "interleaved";
inline constexpr const char* kRotaryDim = "rotary_dim";
inline constexpr const char* kAttentionFactor = "attention_factor";
inline constexpr const char* kTheta = "theta";
inline constexpr const char* kScalingJson = "scaling_json";
inline constexpr const char* kInvertible = "invertible";
inline constexpr const char* kInvFreq = "inv_freq";
inline constexpr std::array kRopeAttributes = {kStyle,       kRotaryDim,  kAttentionFactor, kTheta,
                                               kScalingJson, kInvertible, kInvFreq};

// Attribute of each bulk dataset: SHA-256 of its valid elements (docs/trace_format.md, "Hashes").
inline constexpr const char* kSha256 = "sha256";
inline constexpr std::string_view kHashPrefix = "sha256:";

// Names that start so are the writer's own, free of rules.
inline constexpr std::string_view kUserPrefix = "x_";

// Limits. A number beyond them is taken for corruption, not for ambition. Those of sizes are in traces/limits.hpp.
inline constexpr std::int64_t kMaxLayers = 4096;
inline constexpr std::int64_t kMaxHeads = 4096;
inline constexpr std::int64_t kMaxHeadDim = 8192;
inline constexpr std::int64_t kMaxHidden = std::int64_t{1} << 20;
inline constexpr std::int64_t kMaxTokens = (std::int64_t{1} << 31) - 2;

}  // namespace kvreplay::schema
