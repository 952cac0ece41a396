// What the engine hands to parts beside their views: the prompt's cut and what is retained to compensators, a set's
// scores to allocators.
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <map>

#include "policies/moments.hpp"
#include "tests/support/reference_compare.hpp"

using namespace kvreplay;
using namespace kvreplay::testing;

namespace {

// Keeps all that it is told and estimates nothing.
class Witness final : public Compensator {
 public:
  struct Config {
    int queries = 5;
  };
  static constexpr std::string_view kName = "witness", kSummary = "", kPaper = "", kDeviation = "";
  static constexpr std::array<ParamInfo, 0> kParams{};
  static Needs needs(const Config& c) { return {.prompt_queries = c.queries}; }

  struct Seen {
    int n_prompts = 0;
    PromptCut cut{};
    std::vector<double> log_retained, top_retained;
  };
  static std::map<std::pair<int, int>, Seen> seen;  // by KV head and lane made for it

  Witness(const Config&, const SetShape& shape) : shape_(shape) {
    int copy = 0;
    while (seen.count({shape.kv_head, copy}) > 0) {
      ++copy;
    }
    mine_ = &seen[{shape.kv_head, copy}];
  }
  MomentNeeds needs() const override { return {}; }
  bool sees_retained() const override { return true; }
  void prompt(const PromptCut& cut) override {
    ++mine_->n_prompts;
    mine_->cut = cut;
  }
  void estimate(const EvictedBlock& block, Estimate& out) override {
    const auto append = [](std::vector<double>& to, const Eigen::ArrayXd& x) {
      to.insert(to.end(), x.begin(), x.end());
    };
    append(mine_->log_retained, block.log_retained);
    append(mine_->top_retained, block.top_retained);
    out.log_mass = Eigen::ArrayXd::Constant(block.q.rows(), -std::numeric_limits<double>::infinity());
    out.value = MatD::Zero(block.q.rows(), shape_.v_head_dim);
  }
  double state_bytes() const override { return 0; }

 private:
  SetShape shape_;
  Seen* mine_;
};
std::map<std::pair<int, int>, Witness::Seen> Witness::seen;
constinit const PartInfo witness = describe<Witness>();

// Keeps a span whatever the scores say, and counts.
class KeepSpan final : public Allocator {
 public:
  struct Config {};
  static constexpr std::string_view kName = "keep_span", kSummary = "", kPaper = "", kDeviation = "";
  static constexpr std::array<ParamInfo, 0> kParams{};
  explicit KeepSpan(const Config&) {}
  void over_tokens(const View& view, std::span<const TokenSpan> spans, int n_drop,
                   std::span<float> scores) const override {
    CHECK(n_drop == static_cast<int>(view.pos.size()) - view.budget);
    REQUIRE(spans.size() == 1);
    for (std::size_t i = 0; i < scores.size(); ++i) {
      if (view.pos[i] >= spans[0].begin && view.pos[i] < spans[0].end) {
        scores[i] = std::numeric_limits<float>::infinity();
      }
    }
  }
};
constinit const PartInfo keep_span = describe<KeepSpan>();

ToyOptions toy_options() {
  ToyOptions o;
  o.group_size = 2;
  o.n_tokens = 60;
  o.prompt_len = 24;
  o.v_head_dim = 12;
  return o;
}

}  // namespace

TEST_CASE("a compensator that asks sees the prompt's cut and what each row attends") {
  const std::string text = GENERATE("h2o", "streaming:pool=decode", "h2o:scope=query_head", "tova", "full+topk",
                                    "h2o:budget=9/momentum:scope=kv_head");
  INFO(text);
  const ToyLayer toy = make_toy_layer(toy_options());
  const Layer layer = engine_layer(toy);
  const Method method = parse_method(text);
  PartUse beside;
  beside.info = &witness;
  Job job;
  job.method = &method;
  job.budget = 7;
  ReplayOptions options;
  options.block_steps = 16;
  options.compensators = {&beside};
  options.keep_attended = true;
  Witness::seen.clear();
  const CellResult cell = replay(layer, std::span(&job, 1), options).cells[0];
  REQUIRE(cell.error == "");

  const Scope scope = method.traits.scope;
  const int n_heads = scope == Scope::query_head ? 1 : toy.options.group_size;
  const auto attended = [&](int q_head, int step, Pos p) {
    if (method.read) {
      const std::size_t bytes = (static_cast<std::size_t>(layer.n_tokens) + 7) / 8;
      const std::size_t row = static_cast<std::size_t>(q_head * layer.n_steps() + step) * bytes;
      return (cell.attended[row + static_cast<std::size_t>(p / 8)] >> (p % 8) & 1) != 0;
    }
    const int per_lane = method.prefill_select ? toy.kv_head(q_head) : set_of(toy, scope, q_head);
    return cell.evicted_at[static_cast<std::size_t>(per_lane)][static_cast<std::size_t>(p)] > step;
  };
  for (const auto& [who, seen] : Witness::seen) {
    const int first_head = who.first * toy.options.group_size + (scope == Scope::query_head ? who.second : 0);
    const std::size_t rows = static_cast<std::size_t>(toy.n_steps() * n_heads);
    REQUIRE(seen.log_retained.size() == rows);
    for (std::size_t r = 0; r < rows; ++r) {
      const int step = static_cast<int>(r) / n_heads, head = first_head + static_cast<int>(r) % n_heads;
      const Eigen::VectorXd logits = logits_at(toy, head, toy.options.prompt_len + step);
      double mass = 0, top = -std::numeric_limits<double>::infinity();
      for (Pos p = 0; p < logits.size(); ++p) {
        if (attended(head, step, p)) {
          mass += std::exp(logits[p]);
          top = std::max(top, logits[p]);
        }
      }
      CHECK(seen.log_retained[r] == Approx(std::log(mass)).margin(1e-5));
      CHECK(seen.top_retained[r] == Approx(top).margin(1e-5));
    }

    const bool whole_prompt = method.traits.pool == Pool::decode && !method.prefill_select;
    CHECK(seen.n_prompts == (whole_prompt ? 0 : 1));
    if (whole_prompt) {
      continue;
    }
    std::vector<Pos> kept, left;
    for (Pos p = 0; p < toy.options.prompt_len; ++p) {
      const bool resident = method.read || attended(first_head, 0, p);
      (resident ? kept : left).push_back(p);
    }
    const auto kv = static_cast<std::size_t>(who.first);
    CHECK(seen.cut.retained_k == layer.k[kv](kept, Eigen::all));
    CHECK(seen.cut.retained_v == layer.v[kv](kept, Eigen::all));
    CHECK(seen.cut.evicted_k == layer.k[kv](left, Eigen::all));
    CHECK(seen.cut.evicted_v == layer.v[kv](left, Eigen::all));
    REQUIRE(seen.cut.n_heads == n_heads);
    REQUIRE(seen.cut.q.rows() == 5 * n_heads);
    for (int r = 0; r < seen.cut.q.rows(); ++r) {
      const MatD& q = toy.q[static_cast<std::size_t>(first_head + r % n_heads)];
      const Eigen::RowVectorXd want = toy.scale * q.row(toy.options.prompt_len - 5 + r / n_heads);
      CHECK((seen.cut.q.row(r).cast<double>() - want).norm() < 1e-5);
    }
  }
  CHECK(Witness::seen.size() == static_cast<std::size_t>(scope == Scope::query_head ? toy.n_heads() : 2));
}

TEST_CASE("an allocator over tokens has the last word before tokens leave") {
  const ToyLayer toy = make_toy_layer(toy_options());
  Layer layer = engine_layer(toy);
  layer.spans = {{"rule", 5, 9}};
  Method method = parse_method(GENERATE("h2o", "tova", "streaming:evict=before_attention"));
  method.allocate = PartUse{&keep_span, {}};
  Job job;
  job.method = &method;
  job.budget = 7;
  const CellResult cell = replay(layer, std::span(&job, 1), {}).cells[0];
  REQUIRE(cell.error == "");
  for (const auto& set : cell.evicted_at) {
    for (Pos p = 0; p < layer.n_tokens; ++p) {
      if (p >= 5 && p < 9) {
        CHECK(set[static_cast<std::size_t>(p)] == layer.n_steps());
      }
    }
    CHECK(std::count(set.begin(), set.end(), 0) >= 24 - 7);
  }
}
