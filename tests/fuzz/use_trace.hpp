// Everything that the commands do with a trace, on one that may be anything.
#pragma once
#include "tests/fuzz/fuzz.hpp"
#include "traces/hash.hpp"
#include "traces/info.hpp"
#include "traces/repack.hpp"
#include "traces/verify.hpp"

namespace kvreplay::fuzz {

// A trace that verifies must survive repacking with its content.
inline void use_trace(const std::filesystem::path& path, bool repacks) {
  answered<TraceError>([&] {
    const TraceReader trace(path);
    info_text(trace);
    info_json(trace);
    const TraceInfo& info = trace.info();
    std::vector<float> row(static_cast<std::size_t>(std::max(info.head_dim, info.v_head_dim)));
    for (const int layer : info.layers) {
      answered<TraceError>([&] {
        for (const Pos pos : trace.q_index(layer)) {
          trace.read_q(layer, info.n_heads - 1, pos, pos + 1, std::span(row).first(size_t(info.head_dim)));
        }
        for (const std::string& name : trace.score_names(layer)) {
          trace.read_scores(layer, name, 0);
        }
        if (trace.has_w_o(layer)) {
          trace.read_w_o(layer);
        }
      });
    }
    const VerifyReport report = verify(trace);
    report.text();
    if (!repacks) {
      return;
    }
    const std::filesystem::path out = scratch() / "repacked.h5";
    repack(path, out, {.profile = Profile::archive, .archive = {.chunk_tokens = 8, .deflate = 1}});
    require(hash_trace(TraceReader(out)).content == report.hash, "repacking changed the content");
  });
}

}  // namespace kvreplay::fuzz
