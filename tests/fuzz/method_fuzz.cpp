// Text of methods, budgets and lists. The canonical form of a method is a method, and its own canonical form.
#include "policies/errors.hpp"
#include "policies/method.hpp"
#include "tests/fuzz/fuzz.hpp"

using namespace kvreplay;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::Input input(data, size);
  const std::string text = input.all_text();
  fuzz::answered<ConfigError>([&] {
    const Method method = parse_method(text);
    fuzz::require(text.find(method.label) != std::string::npos, "the label is not what was typed");
    const Method again = parse_method(method.name);
    fuzz::require(again.name == method.name, "'" + method.name + "' parses to '" + again.name + "'");
    fuzz::require(again.parts().size() == method.parts().size(), "'" + method.name + "' has lost a part");
    fuzz::require(again.budgeted() == method.budgeted() && again.foresight() == method.foresight(),
                  "'" + method.name + "' is not the method that it was");
    method.needs();
    for (const int budget : {1, 128, 1 << 20}) {
      fuzz::answered<ConfigError>([&] { method.check(budget, budget); });
    }
    for (const PartUse* part : method.parts()) {
      part->config();
      const std::string one = canonical(*part);
      fuzz::require(canonical(parse_part(one, part->info->role)) == one, "'" + one + "' is not its own canonical form");
    }
  });
  fuzz::answered<ConfigError>([&] {
    const Budget budget = Budget::parse(text);
    fuzz::answered<ConfigError>([&] { fuzz::require(budget.tokens(1000, 256, {}, 1) >= 1, "a budget of no token"); });
  });
  fuzz::answered<ConfigError>([&] {
    std::string joined;
    for (const std::string& one : split_methods(text)) {
      joined += (joined.empty() ? "" : ",") + one;
    }
    fuzz::require(joined.size() <= text.size(), "a list became longer");
  });
  return 0;
}
