#include "sim/measure_layers.hpp"

#include <algorithm>
#include <map>

#include "sim/exact.hpp"
#include "sim/load.hpp"
#include "sim/parallel.hpp"

namespace kvreplay {

std::vector<std::vector<double>> measure_layer(const TraceReader& trace, int layer, Pos prompt_len,
                                               std::span<const PartUse* const> allocators, int threads) {
  std::vector<std::shared_ptr<void>> configs;
  std::vector<Pos> n_queries;  // of the prompt, the last ones
  for (const PartUse* use : allocators) {
    configs.push_back(use->config(layer));
    const int asked = use->info->needs(configs.back().get()).prompt_queries;
    n_queries.push_back(asked == Needs::kAll ? prompt_len : std::min(asked, prompt_len));
  }
  const Pos most = n_queries.empty() ? 0 : *std::max_element(n_queries.begin(), n_queries.end());
  const Layer data = load_layer(trace, layer,
                                {.prompt_len = prompt_len,
                                 .n_tokens = prompt_len,
                                 .first_query = prompt_len - most,
                                 .scores = {},
                                 .values = false});
  std::map<Pos, Allocator::Prompt> prompts;  // by number of queries
  std::vector<std::vector<double>> measured;
  for (std::size_t a = 0; a < allocators.size(); ++a) {
    Allocator::Prompt& prompt = prompts[n_queries[a]];
    if (prompt.column_mass.empty()) {
      prompt = {.layer = layer, .prompt_len = prompt_len, .column_mass = {}};
      prompt.column_mass.resize(std::size_t(data.n_kv_heads));
      parallel(data.n_kv_heads, threads, [&](int h) {
        prompt.column_mass[std::size_t(h)] = column_mass(data, h, prompt_len - n_queries[a], prompt_len);
      });
    }
    measured.push_back(allocators[a]->info->allocate(configs[a].get())->measure(prompt));
  }
  return measured;
}

}  // namespace kvreplay
