// Several moments: the evicted tokens in a few groups, each with its own count, means and as much of its
// second moments as is asked for.
#include "policies/atoms.hpp"

#include "policies/moments.hpp"
#include "policies/part.hpp"

namespace kvreplay {
namespace {

class Atoms final : public Compensator {
 public:
  struct Config {
    int atoms = 16;
    AtomRule::Assign assign = AtomRule::Assign::nearest;
    AtomForm::Kappa kappa = AtomForm::Kappa::diagonal;
    AtomForm::Tilt tilt = AtomForm::Tilt::none;
    int rank = 8;
    double strength = 1;
    bool freeze = true;
    bool clip = true;
    int iterations = 4;
    double decay = 1;
  };
  static constexpr std::string_view kAssignments[] = {"one", "blocks", "nearest"};
  static constexpr std::string_view kKappas[] = {"none", "diagonal", "lowrank"};
  static constexpr std::string_view kTilts[] = {"none", "full", "lowrank"};
  static constexpr std::string_view kName = "atoms";
  static constexpr std::string_view kSummary =
      "several moments: groups of evicted tokens, each an entry of the softmax";
  static constexpr std::string_view kPaper =
      "moments: arXiv:2606.01563; low-rank second-order mass: COBS, arXiv:2607.09052; groups: ResKV, arXiv:2607.29591; "
      "freezing and balls: TiltKV (github.com/TahirSher/KV-Project)";
  static constexpr std::string_view kDeviation =
      "Our combination of published terms. COBS selects blocks with its mass, here it corrects; its factors stay "
      "float32 "
      "and are kept up to date as tokens leave, exact up to rank tokens per atom. atoms=16 and clusters by nearest key "
      "follow notes on VariKV, rank=8 is COBS' best. decay is ours: half of a weight is gone after ln 2 / -ln decay "
      "steps, from the mass too. blocks divide the whole trace, whose length a running model would not know.";
  static constexpr std::array kParams = {
      number<&Config::atoms>("atoms", 1, 4096, "groups at most", Scale::log),
      choice<&Config::assign>("assign", kAssignments,
                              "one: a single group; blocks: equal stretches of the text; nearest: Lloyd's clusters of "
                              "the first keys that leave together, later ones join the nearest"),
      choice<&Config::kappa>("kappa", kKappas,
                             "variance of the logits that adds to the mass: none, of each dimension, or "
                             "of the leading directions"),
      choice<&Config::tilt>("tilt", kTilts, "value-key covariance that tilts the value with the query"),
      number<&Config::rank>("rank", 1, 1024, "of what is low-rank", Scale::log),
      number<&Config::strength>("strength", 0, 2, "factor on kappa"),
      flag<&Config::freeze>("freeze", "beyond a spread of sqrt(2 ln n) the mass grows linearly and the tilt stops"),
      flag<&Config::clip>("clip", "never beyond what the distance of keys and values from their means allows"),
      number<&Config::iterations>("iterations", 1, 100, "of Lloyd's algorithm"),
      number<&Config::decay>("decay", 0.5, 1, "what a step leaves of the statistics' weights; 1: nothing is forgotten",
                             Scale::one_minus),
  };

  Atoms(const Config& c, const SetShape& shape)
      : track_(form(c), rule(c, shape), shape.head_dim, shape.v_head_dim),
        state_bytes_(4 * rule(c, shape).most * AtomTrack::numbers(form(c), shape.head_dim, shape.v_head_dim)) {}

  MomentNeeds needs() const override { return {}; }
  void estimate(const EvictedBlock& block, Estimate& out) override { track_.estimate(block, out); }
  double state_bytes() const override { return state_bytes_; }

 private:
  static AtomForm form(const Config& c) {
    return {.kappa = c.kappa,
            .tilt = c.tilt,
            .rank = c.rank,
            .strength = c.strength,
            .freeze = c.freeze,
            .clip = c.clip && (c.kappa != AtomForm::Kappa::none || c.tilt != AtomForm::Tilt::none)};
  }
  static AtomRule rule(const Config& c, const SetShape& shape) {
    const int most = c.assign == AtomRule::Assign::one ? 1 : c.atoms;
    return {.assign = c.assign,
            .most = most,
            .width = (shape.n_tokens + most - 1) / most + (shape.n_tokens == 0),
            .iterations = c.iterations,
            .decay = c.decay};
  }

  AtomTrack track_;
  double state_bytes_;
};

}  // namespace

extern const PartInfo atoms;
constinit const PartInfo atoms = describe<Atoms>();

}  // namespace kvreplay
