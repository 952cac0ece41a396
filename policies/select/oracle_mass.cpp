// Clairvoyant by attention: drop the token that all later queries together will attend least.
#include "policies/part.hpp"

namespace kvreplay {
namespace {

class OracleMass final : public OracleSelector {
 public:
  struct Config {};
  static constexpr std::string_view kName = "oracle_mass";
  static constexpr std::string_view kSummary = "attention still to come, known from the trace";
  static constexpr std::string_view kPaper = "";
  static constexpr std::string_view kDeviation = "";
  static constexpr Foresight kForesight = Foresight::oracle;
  static constexpr std::array<ParamInfo, 0> kParams{};

  static Needs needs(const Config&) { return {.future_attention = true}; }

  OracleMass(const Config&, const SetShape&) {}
  void reveal(const Future& future) override { future_ = &future; }
  void score(const View& view, std::span<float> out) override { future_->attention_to_come(view, out); }

 private:
  const Future* future_ = nullptr;
};

}  // namespace

extern const PartInfo oracle_mass;
constinit const PartInfo oracle_mass = describe<OracleMass>();

}  // namespace kvreplay
