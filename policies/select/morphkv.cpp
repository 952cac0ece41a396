// MorphKV: the latest tokens, and the older ones that the queries just before the current one attend most.
#include "policies/last_queries.hpp"
#include "policies/part.hpp"

namespace kvreplay {
namespace {

enum class Fuse { sum, max };
constexpr std::string_view kFuses[] = {"sum", "max"};
enum class Heads { each, joint };
constexpr std::string_view kHeads[] = {"each", "joint"};

class MorphKv final : public Selector {
 public:
  struct Config {
    Tokens obs_window{32, false};
    Fuse fuse = Fuse::sum;
    Heads heads = Heads::each;
    bool skip_oldest = true;
    double evict_after = 1;
  };
  static constexpr std::string_view kName = "morphkv";
  static constexpr std::string_view kSummary = "votes of the previous queries on the tokens older than their window";
  static constexpr std::string_view kPaper = "arXiv:2503.00979";
  static constexpr std::string_view kDeviation =
      "the authors' code of 2025: its Mistral file by default (heads=joint,skip_oldest=false: its Llama file); its "
      "capacity C does not count the current token, so that C = budget - 1; at a step that evicts, its query heads "
      "attend sets of their own, here the KV head's set";
  static constexpr std::array kParams{
      number<&Config::obs_window>("obs_window", 1, kUnbounded,
                                  "previous queries, which vote and whose tokens stay beside the current one; the "
                                  "authors' runs: 30 at C=600, 32 at 2000, 200 at 4000",
                                  Scale::log),
      choice<&Config::fuse>("fuse", kFuses, "how the votes of several queries become one number"),
      choice<&Config::heads>("heads", kHeads,
                             "each: a softmax for each query head, then reduced as `group` says; joint: a group's "
                             "logits are summed before one softmax"),
      flag<&Config::skip_oldest>("skip_oldest",
                                 "the window's oldest query has no vote, by an index off by one in the Mistral file"),
      number<&Config::evict_after>("evict_after", 1, 64, "evict once the set is this many times the budget",
                                   Scale::log),
  };
  static Traits traits(const Config&) { return {.group = Reduce::max, .evict = Order::before_attention}; }
  static Needs needs(const Config& c) {
    return {.prompt_queries = c.obs_window.percent ? Needs::kAll : c.obs_window.of(0)};
  }

  MorphKv(const Config& config, const SetShape& shape)
      : config_(config),
        obs_window_(std::max(1, config.obs_window.of(shape.budget))),
        rows_per_voter_(config.heads == Heads::joint ? 1 : shape.n_heads),
        logits_(static_cast<std::size_t>(shape.n_lanes),
                std::vector<Eigen::ArrayXf>(static_cast<std::size_t>(shape.n_tokens))),
        first_voter_(shape.n_tokens) {}

  void prefill(const View& view) override { record(view, obs_window_, 0, view.pos.size()); }
  void observe(const View& view) override {
    record(view, 1, 0, view.pos.size());
    for (const Pos pos : view.rewritten) {
      const auto slot = std::lower_bound(view.pos.begin(), view.pos.end(), pos);
      if (slot != view.pos.end() && *slot == pos) {
        const auto i = static_cast<std::size_t>(slot - view.pos.begin());
        record(view, std::min(obs_window_, view.now - first_voter_) + 1, i, i + 1);
      }
    }
  }

  // The first step adds a token before it evicts, so that the prompt leaves room for it.
  int surplus(const View& view) const override {
    const int room = view.at_prefill() ? 1 : 0, n = static_cast<int>(view.pos.size()) + room;
    return n >= config_.evict_after * view.budget ? n - view.budget : 0;
  }

  void score(const View& view, std::span<float> out) override {
    const Pos now = view.at_prefill() ? view.now + 1 : view.now;  // of the step whose attention this eviction precedes
    const Pos last = now - 1;
    const Pos first = std::min(last, std::max(first_voter_, now - obs_window_ + (config_.skip_oldest ? 1 : 0)));
    const int window = obs_window_ + (view.at_prefill() ? 0 : 1);
    const Eigen::Index n = slots_before(view, window);
    Eigen::ArrayXf votes = Eigen::ArrayXf::Zero(n);
    if (n > 0) {
      count_votes(view, first, last, votes);
    }
    score_before_window(view, votes.cast<double>().matrix().transpose(), window, out);
  }

  void evicted(const View& view, std::span<const int> slots) override {
    for (auto& lane : logits_) {
      for (int slot : slots) {
        lane[at(view, slot)] = {};
      }
    }
  }

 private:
  static std::size_t at(const View& view, Eigen::Index slot) {
    return static_cast<std::size_t>(view.pos[static_cast<std::size_t>(slot)]);
  }
  Eigen::Index column(Pos voter) const { return Eigen::Index{voter % (obs_window_ + 1)} * rows_per_voter_; }

  // Logits of the last queries with the slots from `begin` to `end`. A softmax over fewer tokens needs no more than
  // these, so that a step computes those of its own query alone, and of rewritten keys.
  void record(const View& view, int n_queries, std::size_t begin, std::size_t end) {
    for (int lane = 0; lane < view.n_lanes; ++lane) {
      const MatF q = view.queries(lane, n_queries);
      const int voters = static_cast<int>(q.rows()) / view.n_heads;
      first_voter_ = std::min(first_voter_, view.now - voters + 1);
      Eigen::ArrayXf logits(q.rows()), joint(voters);
      for (int i = static_cast<int>(begin); i < static_cast<int>(end); ++i) {
        logits = (q * view.key(lane, i)).array();
        soft_cap(view.logit_softcap, logits);
        logits += view.bias(lane, i);
        if (config_.heads == Heads::joint) {
          joint = logits.reshaped(view.n_heads, voters).colwise().sum().transpose();
        }
        Eigen::ArrayXf& row = logits_[static_cast<std::size_t>(lane)][at(view, i)];
        if (row.size() == 0) {
          row.setZero(Eigen::Index{obs_window_ + 1} * rows_per_voter_);
        }
        for (int v = 0; v < voters; ++v) {
          row.segment(column(view.now - voters + 1 + v), rows_per_voter_) =
              (config_.heads == Heads::joint ? joint : logits)
                  .segment(Eigen::Index{v} * rows_per_voter_, rows_per_voter_);
        }
      }
    }
  }

  // Softmax of each voter over the first votes.size() slots, reduced over heads, fused over voters.
  void count_votes(const View& view, Pos first, Pos last, Eigen::ArrayXf& votes) const {
    const Eigen::Index n = votes.size(), n_columns = Eigen::Index{obs_window_ + 1} * rows_per_voter_;
    Eigen::ArrayXXf by_voter = Eigen::ArrayXXf::Zero(last - first + 1, n);
    Eigen::ArrayXXf attn(n_columns, n);
    for (const auto& lane : logits_) {
      Eigen::ArrayXf top = lane[at(view, 0)];
      for (Eigen::Index i = 0; i < n; ++i) {
        attn.col(i) = lane[at(view, i)];
        top = top.max(attn.col(i));
      }
      Eigen::ArrayXd z = Eigen::ArrayXd::Zero(n_columns);
      for (Eigen::Index i = 0; i < n; ++i) {
        attn.col(i) = (attn.col(i) - top).exp();
        z += attn.col(i).cast<double>();
      }
      const Eigen::ArrayXf share = z.inverse().cast<float>();
      for (Eigen::Index i = 0; i < n; ++i) {
        attn.col(i) *= share;
        for (Pos p = first; p <= last; ++p) {
          const auto heads = attn.col(i).segment(column(p), rows_per_voter_);
          float& vote = by_voter(p - first, i);
          vote = view.group == Reduce::max ? std::max(vote, heads.maxCoeff()) : vote + heads.sum();
        }
      }
    }
    votes = config_.fuse == Fuse::sum ? by_voter.colwise().sum().transpose().eval()
                                      : by_voter.colwise().maxCoeff().transpose().eval();
  }

  Config config_;
  int obs_window_;
  Eigen::Index rows_per_voter_;
  // Per lane and position, empty when gone: ((obs_window + 1) * rows_per_voter), a ring over queries.
  std::vector<std::vector<Eigen::ArrayXf>> logits_;
  Pos first_voter_;  // of all queries met
};

}  // namespace

extern const PartInfo morphkv;
constinit const PartInfo morphkv = describe<MorphKv>();

}  // namespace kvreplay
