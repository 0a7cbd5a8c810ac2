// Group PE that takes one term a cycle, as the plain one (gpe.v), with what may save energy as
// parameters, each of which may be studied alone:
//
// ISOLATED  the wide adder's operands are held at zero but in a group's last slot
// LATE      the group's sum is registered and joins the partial sum a cycle later: two adders are
//           no longer in series, the wide one sees a still operand, and sums leave a cycle later
// ONE_HOT   selects arrive decoded and pick by AND-OR; unselected activations move nothing
// OFFSET    activations and operands are unsigned (offset_dot.v): a subtracted term adds the
//           complement, so no sign is extended and no carry comes in
// HORNER    terms come by falling exponent; the sum moves up by the difference of two exponents
//           before a term is added to its lowest bits, and by the last exponent at the end. No
//           term is shifted, but the whole sum is: the amounts take as long as exponents to send
// CELLS     adders are chains of full-adder cells
module serial_pe #(
    parameter GROUP = 8,
    parameter WIDTH = 8,
    parameter PSUM = 28,
    parameter ISOLATED = 0,
    parameter LATE = 0,
    parameter ONE_HOT = 0,
    parameter OFFSET = 0,
    parameter HORNER = 0,
    parameter CELLS = 0,
    parameter EXPONENT = $clog2(WIDTH),
    parameter WHERE = ONE_HOT ? GROUP : 1 + $clog2(GROUP)
) (
    input                         clock,
    input                         reset,
    input                         load,
    input      [GROUP*WIDTH-1:0]  activations_in,  // the column's bus
    input      [WHERE-1:0]        where_in,        // one-hot, or {valid, index}
    input                         sign_in,
    input      [EXPONENT-1:0]     exponent_in,     // HORNER: how far the sum moves up first
    input      [HORNER ? EXPONENT-1 : 0:0] rest_in,  // HORNER: the last term's exponent
    input                         last_in,
    output reg [WHERE-1:0]        where_out,
    output reg                    sign_out,
    output reg [EXPONENT-1:0]     exponent_out,
    output reg [HORNER ? EXPONENT-1 : 0:0] rest_out,
    output reg                    last_out,
    input      [PSUM-1:0]         psum_in,
    output reg [PSUM-1:0]         psum
);
    localparam SUM = 2 * WIDTH + $clog2(GROUP) + 1;

    reg [GROUP*WIDTH-1:0] activations;
    reg [SUM-1:0] sum;

    wire [GROUP-1:0] select;
    reg  [WIDTH-1:0] picked;
    wire [WIDTH-1:0] selected;
    integer i;
    generate
        if (ONE_HOT) begin : by_one_hot
            assign select = where_in;
            always @* begin
                picked = {WIDTH{1'b0}};
                for (i = 0; i < GROUP; i = i + 1)
                    picked = picked | (activations[i*WIDTH +: WIDTH] & {WIDTH{select[i]}});
            end
            assign selected = picked;
        end else begin : by_index
            wire [$clog2(GROUP)-1:0] index = where_in[$clog2(GROUP)-1:0];
            assign selected = activations[index*WIDTH +: WIDTH] & {WIDTH{where_in[WHERE-1]}};
        end
    endgenerate

    // The term as a word of SUM bits, less one if subtracted and not in offset form.
    wire [WIDTH-1:0] complemented = selected ^ {WIDTH{sign_in}};
    wire [SUM-1:0] extended = {{(SUM-WIDTH){OFFSET ? 1'b0 : complemented[WIDTH-1]}}, complemented};
    wire [SUM-1:0] below = OFFSET || HORNER ? {SUM{1'b0}} : ~({SUM{1'b1}} << exponent_in);
    wire [SUM-1:0] term = HORNER ? extended
                                 : (extended << exponent_in) | (below & {SUM{sign_in}});
    wire [SUM-1:0] base = HORNER ? sum << exponent_in : sum;
    wire           carry_in = OFFSET ? 1'b0 : sign_in;
    wire [SUM-1:0] next_sum;
    generate
        if (CELLS) begin : narrow_cells
            wire [SUM:0] total;
            ripple_adder #(.WIDTH(SUM+1)) adder (
                .a({base, carry_in}), .b({term, carry_in}), .sum(total)
            );
            assign next_sum = total[SUM:1];
        end else begin : narrow_plain
            wire [SUM:0] total = {base, carry_in} + {term, carry_in};
            assign next_sum = total[SUM:1];
        end
    endgenerate

    wire [SUM-1:0] closing = HORNER ? next_sum << rest_in : next_sum;
    reg  [SUM-1:0] held;
    reg            held_last;
    wire           take = LATE ? held_last : last_in;
    wire [SUM-1:0] joining = (LATE ? held : closing) & {SUM{ISOLATED ? take : 1'b1}};
    wire [PSUM-1:0] from_above = psum_in & {PSUM{ISOLATED ? take : 1'b1}};
    wire [PSUM-1:0] wide = {{(PSUM-SUM){OFFSET ? 1'b0 : joining[SUM-1]}}, joining};
    wire [PSUM-1:0] next_psum;
    generate
        if (CELLS) begin : wide_cells
            ripple_adder #(.WIDTH(PSUM)) adder (.a(from_above), .b(wide), .sum(next_psum));
        end else begin : wide_plain
            assign next_psum = from_above + wide;
        end
    endgenerate

    always @(posedge clock) begin
        if (load) activations <= activations_in;
        sum <= reset | last_in ? {SUM{1'b0}} : next_sum;
        if (last_in) held <= closing;
        held_last <= last_in & ~reset;
        if (take) psum <= next_psum;
        where_out <= where_in;
        sign_out <= sign_in;
        exponent_out <= exponent_in;
        rest_out <= rest_in;
        last_out <= last_in & ~reset;
    end
endmodule
