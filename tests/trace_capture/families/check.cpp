// check_decoder family FOLDER...             every tensor's distance from FOLDER/reference; exit 1 if beyond 1e-4
// check_decoder reference MODEL FOLDER       the same with the reference in another folder
// check_decoder greedy MODEL REFERENCE.json  do the greedy tokens come out? exit 1 if not
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/trace_capture/families/compare.hpp"

namespace {

using namespace kvreplay;

constexpr double kTolerance = 1e-4;

bool check_reference(const std::filesystem::path& folder, const std::filesystem::path& reference_folder) {
  const Model model = open_model(folder);
  const test::Reference reference = test::read_reference(reference_folder, model.config);
  const auto decoder = make_cpu_decoder(model, static_cast<Pos>(reference.ids.size()));
  const test::Tensors found = test::decode(*decoder, model.config, reference.ids, reference.passes, reference.rows);
  bool right = true;
  std::printf("%s (%s, rope %s):", folder.c_str(), model.config.architecture.c_str(), model.config.rope.type.c_str());
  for (const auto& [name, value] : test::differences(found, reference.tensors)) {
    std::printf(" %s %.1e", name.c_str(), value);
    right = right && value <= kTolerance;
  }
  std::printf("%s\n", right ? "" : "  WRONG");
  return right;
}

bool check_greedy(const std::filesystem::path& folder, const char* path) {
  const Model model = open_model(folder);
  std::ifstream file(path);
  const nlohmann::json json = nlohmann::json::parse(file);
  const auto prompt = json.at("prompt_token_ids").get<std::vector<std::int32_t>>();
  std::vector<std::int32_t> expected;
  if (json.contains("greedy_continuation")) {
    expected = json.at("greedy_continuation").get<std::vector<std::int32_t>>();
  } else {  // the prompt comes first
    expected = json.at("greedy_token_ids").get<std::vector<std::int32_t>>();
    expected.erase(expected.begin(), expected.begin() + static_cast<std::ptrdiff_t>(prompt.size()));
  }
  const auto decoder = make_cpu_decoder(model, static_cast<Pos>(prompt.size() + expected.size()));
  const std::vector<std::int32_t> found = test::greedy(*decoder, prompt, expected.size());
  std::size_t same = 0;
  while (same < found.size() && found[same] == expected[same]) {
    ++same;
  }
  std::printf("%s: %zu of %zu greedy tokens are the reference's\n", folder.c_str(), same, expected.size());
  return same == expected.size();
}

}  // namespace

int main(int argc, char** argv) try {
  const std::string what = argc > 2 ? argv[1] : "";
  bool right = true;
  if (what == "family") {
    for (int i = 2; i < argc; ++i) {
      const std::filesystem::path folder = argv[i];
      right = check_reference(folder, folder / "reference") && right;
    }
  } else if (what == "reference" && argc == 4) {
    right = check_reference(argv[2], argv[3]);
  } else if (what == "greedy" && argc == 4) {
    right = check_greedy(argv[2], argv[3]);
  } else {
    std::fprintf(stderr,
                 "usage: check_decoder family FOLDER... | reference MODEL FOLDER | greedy MODEL REFERENCE.json\n");
    return 2;
  }
  return right ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "check_decoder: %s\n", error.what());
  return 1;
}
