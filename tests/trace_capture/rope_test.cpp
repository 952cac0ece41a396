// Frequencies against those that transformers computes, and what depends on the length.
#include "trace_capture/rope.hpp"

#include <catch2/catch.hpp>

#include "tests/trace_capture/model_folder.hpp"

namespace kvreplay::test {
namespace {

struct Reference {
  const char* name;
  double theta;
  const char* scaling;
  int head_dim, max_positions, n_tokens;
  double attention_factor;
  std::vector<std::pair<std::size_t, double>> inv_freq;  // some of them, by index
};

// Printed by tests/trace_capture/rope_reference.py.
// clang-format off
const std::vector<Reference> kReferences = {
    {"default", 500000.0, R"({"rope_type": "default"})", 128, 8192, 0, 1, {{0, 1}, {1, 0.814617217}, {16, 0.0376060307}, {29, 0.00261609908}, {32, 0.00141421345}, {37, 0.000507321151}, {48, 5.31829573e-05}, {63, 2.4551407e-06}}},
    {"linear", 10000.0, R"({"rope_type": "linear", "factor": 2.5})", 64, 4096, 0, 1, {{0, 0.400000006}, {1, 0.299957693}, {8, 0.0399999991}, {13, 0.00948549435}, {16, 0.00399999972}, {21, 0.000948549539}, {24, 0.000400000019}, {31, 5.33408602e-05}}},
    {"dynamic, within the context", 10000.0, R"({"rope_type": "dynamic", "factor": 4.0})", 64, 2048, 2048, 1, {{0, 1}, {1, 0.749894202}, {8, 0.100000001}, {13, 0.0237137359}, {16, 0.00999999978}, {21, 0.00237137382}, {24, 0.00100000005}, {31, 0.00013335215}}},
    {"dynamic, one beyond the context", 10000.0, R"({"rope_type": "dynamic", "factor": 4.0})", 64, 2048, 2049, 1, {{0, 1}, {1, 0.749846995}, {8, 0.0999496654}, {13, 0.0236943401}, {16, 0.00998993404}, {21, 0.00236824132}, {24, 0.00099849049}, {31, 0.000133092195}}},
    {"dynamic, far beyond the context", 10000.0, R"({"rope_type": "dynamic", "factor": 4.0})", 64, 2048, 5000, 1, {{0, 1}, {1, 0.705043435}, {8, 0.0610558093}, {13, 0.0106366863}, {16, 0.00372781185}, {21, 0.000649431488}, {24, 0.000227604571}, {31, 1.97102472e-05}}},
    {"llama3 of Llama 3.1", 500000.0, R"({"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "factor": 8.0})", 128, 131072, 0, 1, {{0, 1}, {1, 0.814617217}, {16, 0.0376060307}, {29, 0.00216657063}, {32, 0.000524846022}, {37, 6.34151438e-05}, {48, 6.64786967e-06}, {63, 3.06892588e-07}}},
    {"llama3 of Llama 3.2 1B", 500000.0, R"({"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "factor": 32.0})", 64, 131072, 0, 1, {{0, 1}, {1, 0.663601279}, {8, 0.0376060307}, {13, 0.00483942125}, {16, 0.000429556705}, {21, 5.68723226e-06}, {24, 1.66196742e-06}, {31, 9.41830649e-08}}},
    {"yarn of Qwen 2.5", 1000000.0, R"({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768})", 128, 32768, 0, 1.13862944, {{0, 1}, {1, 0.805842221}, {16, 0.0316227786}, {29, 0.00140511245}, {32, 0.000602941145}, {37, 0.00012993149}, {48, 7.90569356e-06}, {63, 3.10234441e-07}}},
    {"yarn, every number given", 10000.0, R"({"rope_type": "yarn", "original_max_position_embeddings": 4096, "factor": 40.0, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.707, "truncate": false})", 64, 163840, 0, 1.0857264, {{0, 1}, {1, 0.749894202}, {8, 0.100000001}, {13, 0.0233312435}, {16, 0.00579010462}, {21, 5.92843462e-05}, {24, 2.49999994e-05}, {31, 3.33380353e-06}}},
    {"yarn, mscale alone", 10000.0, R"({"rope_type": "yarn", "original_max_position_embeddings": 4096, "factor": 40.0, "mscale": 0.5})", 64, 163840, 0, 1.36888795, {{0, 1}, {1, 0.749894202}, {8, 0.100000001}, {13, 0.0183781441}, {16, 0.00550000044}, {21, 0.000414990413}, {24, 2.49999994e-05}, {31, 3.33380353e-06}}},
    {"yarn, attention factor given", 150000.0, R"({"rope_type": "yarn", "original_max_position_embeddings": 4096, "factor": 32.0, "attention_factor": 1.25})", 64, 131072, 0, 1.25, {{0, 1}, {1, 0.689044297}, {8, 0.0508132726}, {13, 0.00406955462}, {16, 0.000580947497}, {21, 1.25325696e-05}, {24, 4.09997847e-06}, {31, 3.0235114e-07}}},
    {"yarn, a step for a ramp", 10000.0, R"({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16})", 16, 32, 0, 1.06931472, {{0, 1}, {1, 0.158113882}, {2, 0.0500000007}, {4, 0.00499999989}, {6, 0.000500000024}, {7, 0.000158113893}}},
    {"yarn, a ramp that begins beyond the head", 100.0, R"({"rope_type": "yarn", "original_max_position_embeddings": 4096, "factor": 4.0, "beta_slow": 0.25})", 32, 16384, 0, 1.13862944, {{0, 1}, {1, 0.749894202}, {4, 0.316227764}, {5, 0.237137362}, {8, 0.100000001}, {12, 0.0289875474}, {13, 0.0207495186}, {15, 0.0105570452}}},
    {"yarn, factor from the lengths", 10000.0, R"({"rope_type": "yarn", "original_max_position_embeddings": 4096, "factor": null})", 64, 16384, 0, 1.13862944, {{0, 1}, {1, 0.749894202}, {8, 0.100000001}, {13, 0.0196094345}, {16, 0.00653846189}, {21, 0.000866463524}, {24, 0.000250000012}, {31, 3.33380376e-05}}},
};
// clang-format on

// The configuration through config.json, as transformers 4 or 5 writes it.
ModelConfig configured(const Reference& reference, bool version_5) {
  nlohmann::json config = small_llama();
  nlohmann::json scaling = nlohmann::json::parse(reference.scaling);
  config["head_dim"] = reference.head_dim;
  config["max_position_embeddings"] = reference.max_positions;
  if (version_5) {
    scaling["rope_theta"] = reference.theta;
    config["rope_parameters"] = scaling;
  } else {
    scaling["type"] = scaling["rope_type"];
    scaling.erase("rope_type");
    config["rope_theta"] = reference.theta;
    config["rope_scaling"] = scaling;
  }
  return read_config(ModelFolder(config).path());
}

TEST_CASE("frequencies are those of transformers, whichever version wrote config.json") {
  for (const Reference& reference : kReferences) {
    for (const bool version_5 : {false, true}) {
      INFO(reference.name);
      const ModelConfig config = configured(reference, version_5);
      const RopeTable table = rope_table(config.rope, config.head_dim, config.max_positions, reference.n_tokens);
      CHECK(table.attention_factor == Approx(reference.attention_factor).epsilon(1e-6));
      REQUIRE(table.inv_freq.size() == static_cast<std::size_t>(reference.head_dim / 2));
      for (const auto& [index, expected] : reference.inv_freq) {
        INFO("inv_freq[" << index << "]");
        CHECK(table.inv_freq[index] == Approx(expected).epsilon(1e-6));
      }
    }
  }
}

TEST_CASE("only dynamic frequencies depend on the length, and only beyond the context") {
  for (const Reference& reference : kReferences) {
    INFO(reference.name);
    const ModelConfig config = configured(reference, true);
    const int n = config.max_positions;
    const auto table = [&](int n_tokens) { return rope_table(config.rope, config.head_dim, n, n_tokens).inv_freq; };
    const bool dynamic = config.rope.type == "dynamic";
    CHECK(rope_is_fixed(config.rope, n, n));
    CHECK(table(1) == table(n));
    CHECK(rope_is_fixed(config.rope, n, n + 1) == !dynamic);
    CHECK((table(n) == table(n + 1)) == !dynamic);
    CHECK((table(n + 1) == table(2 * n)) == !dynamic);
  }
}

}  // namespace
}  // namespace kvreplay::test
